"""`python -m index`, as an operator meets it."""

import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from index import __main__ as command
from index.__main__ import main
from index.collection_set import CollectionSet
from index.errors import FormatUnavailable
from index.export_file import reading_export, writing_export
from index.store import FILE_NAME
from tests.index.helpers import MODEL, REPOSITORY, create, fill

pytest.importorskip("pyarrow")


@pytest.fixture
def filled(root: Path) -> Path:
    with CollectionSet(root) as collections:
        fill(create(collections), 20)
        create(collections, "empty")
    return root


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "index", *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def answer(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """What a command prints with --json; it must go well."""
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The error of a command that must not go well."""
    assert main([*map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    error = printed.err.splitlines()[-1]
    assert error.startswith("error: ")
    return error


def test_from_one_folder_to_another(filled: Path, tmp_path: Path) -> None:
    file, other = tmp_path / "pictures.jsonl", tmp_path / "other"
    other.mkdir()
    out = run("export", filled, "pictures", file)
    assert out.returncode == 0, out.stderr
    assert out.stdout.split() == ["file", "records", str(file), "20"]
    back = run("import", other, "copy", file, "--new", "--json")
    assert back.returncode == 0, back.stderr
    assert json.loads(back.stdout) == {
        "file": str(file),
        "created": 20,
        "updated": 0,
        "unchanged": 0,
    }
    listed = run("list", other).stdout.splitlines()
    assert listed[0].split() == ["name", "records", "spaces", "model", "created_at", "damaged"]
    assert listed[1].startswith("copy  20       cls 4, copy 6  sha256:a-model  20")
    assert len(listed) == 2


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_the_name_tells_the_format(
    filled: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / f"a.b{suffix}"
    assert answer(capsys, "export", filled, "pictures", file) == {
        "file": str(file),
        "records": 20,
    }
    magic = {".jsonl": b"{", ".jsonl.gz": b"\x1f\x8b", ".parquet": b"PAR1"}
    assert file.read_bytes().startswith(magic[suffix])
    assert [path.name for path in tmp_path.iterdir() if path != filled] == [file.name]
    counts = answer(capsys, "import", filled, "pictures", file)
    assert (counts["created"], counts["unchanged"]) == (0, 20)
    assert answer(capsys, "import", filled, "empty", file)["created"] == 20


def test_list(filled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (filled / "empty" / FILE_NAME).write_bytes(b"nonsense" * 1000)
    damaged, whole = answer(capsys, "list", filled)
    assert damaged["name"] == "empty"
    assert "cannot be read" in damaged["damaged"]
    assert damaged["records"] is None
    assert (whole["name"], whole["records"], whole["model"]) == ("pictures", 20, MODEL)
    assert whole["spaces"] == {"cls": 4, "copy": 6}
    (tmp_path / "new").mkdir()
    assert main(["list", str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out == "none\n"


def test_stats(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stats = answer(capsys, "stats", filled, "pictures")
    assert 20 in stats.values()
    assert main(["stats", str(filled), "pictures"]) == 0
    shown = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert {name.split(".")[0] for name in shown} == {
        name for name, value in stats.items() if value != {}
    }
    assert "no collection 'b'" in refusal(capsys, "stats", filled, "b")


def test_check(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = [{"name": "empty", "faults": []}, {"name": "pictures", "faults": []}]
    assert answer(capsys, "check", filled) == whole
    assert answer(capsys, "check", filled, "pictures") == whole[1:]
    (filled / "empty" / FILE_NAME).write_bytes(b"nonsense" * 1000)
    assert main(["check", str(filled), "--json"]) == 1
    damaged, good = json.loads(capsys.readouterr().out)
    assert "cannot be read" in damaged["faults"][0]
    assert good == whole[1]
    assert main(["check", str(filled)]) == 1
    assert "cannot be read" in capsys.readouterr().out
    assert main(["check", str(filled), "pictures"]) == 0


def test_snapshots(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, "snapshots", filled, "pictures") == []
    snapshot = answer(capsys, "snapshot", filled, "pictures")
    assert answer(capsys, "snapshots", filled, "pictures") == [snapshot]
    assert main(["snapshots", str(filled), "pictures"]) == 0
    assert snapshot["name"] in capsys.readouterr().out
    with CollectionSet(filled) as collections:
        collections.get("pictures").delete(["r3", "r4"])
    assert answer(capsys, "restore", filled, "pictures", snapshot["name"]) == {
        "restored": "pictures",
        "snapshot": snapshot["name"],
    }
    with CollectionSet(filled) as collections:
        assert collections.get("pictures").count() == 20
    assert "'lost'" in refusal(capsys, "restore", filled, "pictures", "lost")


def test_a_snapshot_puts_a_damaged_collection_right(
    filled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshot = answer(capsys, "snapshot", filled, "pictures")["name"]
    (filled / "pictures" / FILE_NAME).write_bytes(b"nonsense" * 1000)
    assert main(["check", str(filled), "pictures"]) == 1
    capsys.readouterr()
    answer(capsys, "restore", filled, "pictures", snapshot)
    assert answer(capsys, "list", filled)[1]["records"] == 20


def test_rebuild(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, "rebuild", filled, "pictures") == {"rebuilt": "pictures"}
    assert answer(capsys, "list", filled)[1]["records"] == 20


def test_an_export_of_some(
    filled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "some.jsonl"
    some = '{"must": [{"key": "number", "range": {"gte": 15}}]}'
    options = ("--filter", some)
    assert answer(capsys, "export", filled, "pictures", file, *options)["records"] == 5
    ids = [json.loads(line)["id"] for line in file.read_text().splitlines()[1:-1]]
    assert ids == [f"r{number}" for number in range(15, 20)]
    file.unlink()
    options = ("--filter", '{"must": 3}')
    assert "filter.must" in refusal(capsys, "export", filled, "pictures", file, *options)
    assert not file.exists()


def test_a_folder_in_use(filled: Path) -> None:
    with CollectionSet(filled):
        found = run("list", filled)
    assert found.returncode == 2
    assert found.stdout == ""
    assert f"error: {filled} is in use by process " in found.stderr


def test_mistakes(filled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.jsonl"
    absent = tmp_path / "absent"
    assert f"'{absent}' is not a folder" in refusal(capsys, "list", absent)
    assert not absent.exists()
    assert "no collection 'b'" in refusal(capsys, "export", filled, "b", file)
    assert ".jsonl.gz" in refusal(capsys, "export", filled, "pictures", tmp_path / "a.csv")
    assert ".parquet" in refusal(capsys, "import", filled, "pictures", tmp_path / "a.json")
    assert str(file) in refusal(capsys, "import", filled, "pictures", file)
    assert main(["export", str(filled), "pictures", str(file)]) == 0
    capsys.readouterr()
    written = file.read_bytes()
    assert "exists already" in refusal(capsys, "export", filled, "empty", file)
    assert file.read_bytes() == written
    assert "already" in refusal(capsys, "import", filled, "pictures", file, "--new")
    assert "'No'" in refusal(capsys, "import", filled, "No", file, "--new")
    assert "no collection 'b'" in refusal(capsys, "import", filled, "b", file)
    for unknown in (
        ["lost", str(filled)],
        [],
        ["export", str(filled), "pictures"],
        ["export", str(filled), "pictures", str(file), "--filter", "{"],
    ):
        with pytest.raises(SystemExit, match="2"):
            main(unknown)
    assert "not JSON" in capsys.readouterr().err


def test_a_fault_in_a_file_is_named(
    filled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.jsonl.gz"
    assert main(["export", str(filled), "pictures", str(file)]) == 0
    capsys.readouterr()
    lines = gzip.decompress(file.read_bytes()).splitlines(keepends=True)
    lines[6] = b'{"id": "r5"}\n'
    file.write_bytes(gzip.compress(b"".join(lines)))
    fault = refusal(capsys, "import", filled, "empty", file)
    assert fault == (
        f"error: {file}, line 7: 'vectors' missing. "
        "The 5 records before that are in collection 'empty'"
    )
    for damaged in (file.read_bytes()[:-40], b"no gzip", file.read_bytes()[:-8] + bytes(8)):
        file.write_bytes(damaged)
        assert "cannot be read" in refusal(capsys, "import", filled, "empty", file)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_an_export_that_was_stopped_leaves_nothing(
    filled: Path,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Stopping:
        def update(self, count: int) -> None:
            raise KeyboardInterrupt

    @contextmanager
    def bar(total: int | None) -> Iterator[Stopping]:
        yield Stopping()

    monkeypatch.setattr(command, "_bar", bar)
    assert main(["export", str(filled), "pictures", str(tmp_path / name)]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [filled]
    assert main(["list", str(filled)]) == 0  # and the folder was let go


def test_files_of_no_known_format(tmp_path: Path) -> None:
    for name in ("a", ".gz", "a.jsonl.bz2", "parquet"):
        with (
            pytest.raises(FormatUnavailable, match=r"must end in one of \.jsonl"),
            writing_export(tmp_path / name),
        ):
            pass
        with pytest.raises(FormatUnavailable), reading_export(tmp_path / name):
            pass
    assert list(tmp_path.iterdir()) == []
