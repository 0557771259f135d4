import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.training.conftest import ROOT, write_pictures
from tests.training.test_data import write_tar
from training.parquet import ParquetPictures, RowGroups, read_through, row_count
from training.sources import DataError, class_labels, find_shards, open_pictures

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def write_parquet(
    path: Path, rows: list[bytes | None], *, rows_per_group: int = 3, **columns: Any
) -> Path:
    """A file as `datasets` writes it; columns: `paths` and `label`."""
    paths = columns.pop("paths", [None] * len(rows))
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    images = [{"bytes": content, "path": name} for content, name in zip(rows, paths, strict=True)]
    table = pyarrow.table({"image": pyarrow.array(images, kind), **columns})
    parquet.write_table(table, path, row_group_size=rows_per_group)
    return path


@pytest.fixture
def contents(tmp_path: Path) -> list[bytes]:
    names = write_pictures(tmp_path / "pictures", 8)
    return [(tmp_path / "pictures" / name).read_bytes() for name in names]


def read_all(path: Path) -> list[bytes]:
    pictures = open_pictures([path])
    return [pictures.read(i) for i in range(len(pictures.names))]


def refusal(*paths: Path) -> str:
    with pytest.raises(DataError) as caught:
        open_pictures(paths)
    return str(caught.value)


def test_a_list_of_files(tmp_path: Path, contents: list[bytes]) -> None:
    absolute = tmp_path / "pictures" / "005.png"
    path = tmp_path / "some.txt"
    path.write_text(
        f"# chosen by hand\npictures/003.png\n\n  pictures/001.png \r\n#\n{absolute}\n", newline=""
    )
    pictures = open_pictures([path])
    assert pictures.names == ["pictures/003.png", "pictures/001.png", str(absolute)]
    assert read_all(path) == [contents[3], contents[1], contents[5]]
    assert class_labels(pictures, where="x") == ["pictures"] * 3


def test_a_list_that_names_what_is_not_there(tmp_path: Path, contents: list[bytes]) -> None:
    path = tmp_path / "some.txt"
    path.write_text("# two\n\npictures/003.png\npictures/gone.png\n")
    said = refusal(path)
    assert f"line 4 of {str(path)!r}" in said
    assert "'pictures/gone.png'" in said
    path.write_text("pictures\n")
    assert "line 1" in refusal(path)
    path.write_text("# nothing\n")
    assert "holds no picture" in refusal(path)
    path.write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in refusal(path)


def test_parquet(tmp_path: Path, contents: list[bytes]) -> None:
    names = [f"a/{i}.png" for i in range(8)]
    path = write_parquet(tmp_path / "train.parquet", list(contents), paths=names)
    pictures = open_pictures([path])
    assert pictures.names == names
    for i in (7, 0, 3, 2, 5, 6, 1, 4):
        assert pictures.read(i) == contents[i]
    assert row_count(path) == 8
    assert [(name, read()) for name, read in read_through(path)] == list(
        zip(names, contents, strict=True)
    )


def test_parquet_of_bare_bytes_and_labels(tmp_path: Path, contents: list[bytes]) -> None:
    path = tmp_path / "bare.parquet"
    parquet.write_table(pyarrow.table({"image": contents, "label": [0, 1] * 4}), path)
    pictures = open_pictures([path])
    assert pictures.names[:2] == ["0/00000000", "1/00000001"]
    assert class_labels(pictures, where="x") == ["0", "1"] * 4
    assert read_all(path) == contents

    labelled: list[Any] = ["a/c", None]
    path = write_parquet(
        tmp_path / "x.parquet", [contents[0], None], paths=["p/q.png", ""], label=labelled
    )
    pictures = open_pictures([path])
    assert pictures.names == ["a_c/q.png", "00000001"]
    assert pictures.read(1) == b""
    with pytest.raises(DataError, match="lies in no class folder"):
        class_labels(pictures, where="x")


def test_row_groups_are_read_once_while_they_are_held(
    tmp_path: Path, contents: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(tmp_path / "a.parquet", list(contents), rows_per_group=2)
    read: list[int] = []
    whole = ParquetPictures._read

    def noting(self: ParquetPictures, group: int) -> Any:
        read.append(group)
        return whole(self, group)

    monkeypatch.setattr(ParquetPictures, "_read", noting)
    shared = RowGroups(2)
    first, second = ParquetPictures(path, shared), ParquetPictures(path, shared)
    for i in (0, 1, 2, 3, 0, 7, 2, 1):
        assert first.read(i) == contents[i]
    assert read == [0, 1, 3, 1, 0]
    second.read(1)
    assert read == [0, 1, 3, 1, 0]


def test_parquet_that_cannot_be_used(tmp_path: Path, contents: list[bytes]) -> None:
    path = tmp_path / "bad.parquet"
    path.write_bytes(b"PAR1 and no more")
    assert "not a whole Parquet file" in refusal(path)
    for image in ([1], [[b"x"]], ["text"]):
        parquet.write_table(pyarrow.table({"image": image, "other": [2]}), path)
        said = refusal(path)
        assert str(path) in said
        assert "no column 'image' of encoded pictures" in said
        assert "other: int64" in said
    whole = write_parquet(path, [c * 99 for c in contents], rows_per_group=4).read_bytes()
    path.write_bytes(whole[:4] + bytes(2000) + whole[2004:])
    pictures = ParquetPictures(path, RowGroups())
    with pytest.raises(DataError, match=r"bad\.parquet"):
        pictures.read(0)


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", [b"x"])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "pip install 'dinoscope[parquet]'" in refusal(path)


def test_a_folder_of_shards(tmp_path: Path, contents: list[bytes]) -> None:
    names = [f"{i:03d}.png" for i in range(8)]
    folder = tmp_path / "shards"
    (folder / "more").mkdir(parents=True)
    write_tar(folder / "b.tar", tmp_path / "pictures", names[2:4])
    write_tar(folder / "more" / "c.tgz", tmp_path / "pictures", names[4:5], "gz")
    write_parquet(folder / "a.parquet", list(contents[:2]))
    (folder / "index.json").write_text(json.dumps({"no": "picture"}))
    (folder / ".hidden.tar").write_bytes(b"no tar")
    assert read_all(folder) == contents[:5]
    assert [path.name for path in find_shards([folder])] == ["a.parquet", "b.tar", "c.tgz"]
    (folder / "loose.png").write_bytes(contents[7])
    assert read_all(folder) == [contents[7]]  # as before: tars beside pictures are no part of them


def test_only_shards_are_streamed(tmp_path: Path, contents: list[bytes]) -> None:
    (tmp_path / "some.txt").write_text("pictures/000.png\n")
    for path in (tmp_path / "pictures", tmp_path / "some.txt"):
        with pytest.raises(DataError, match=r"only shards are streamed.*data\.stream"):
            find_shards([path])
    with pytest.raises(DataError, match="does not exist"):
        find_shards([tmp_path / "nowhere"])


def test_photographs_in_every_kind_of_source(tmp_path: Path) -> None:
    photos = ROOT.parent / "shared" / "data" / "ecssd" / "images"
    if not photos.exists():
        pytest.skip(f"{photos.name} is not in {photos.parent}")
    names = sorted(path.name for path in photos.glob("*.jpg"))[:6]
    expected = [(photos / name).read_bytes() for name in names]
    (tmp_path / "list.txt").write_text("".join(f"{photos / name}\n" for name in names))
    write_tar(tmp_path / "all.tar.xz", photos, names, "xz")
    write_parquet(tmp_path / "all.parquet", list(expected), paths=names)
    for source in ("list.txt", "all.tar.xz", "all.parquet"):
        assert read_all(tmp_path / source) == expected
