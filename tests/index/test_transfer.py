"""Exports and imports: what went out comes in equal, and whatever is wrong is named."""

import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from index.collection import Collection, CollectionSet, NewRecord
from index.errors import (
    CollectionExists,
    CollectionNotFound,
    FormatUnavailable,
    ImportFailed,
    InvalidName,
    InvalidVector,
    ModelMismatch,
    RecordNotFound,
)
from index.jsonl import MAX_LINE_BYTES
from index.transfer import FORMATS, Format, export_records, import_new, import_records
from tests.index.helpers import MODEL, REPOSITORY, SPACES, create, fill, record, vectors

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

NO_HEADER = {"format": "dinoscope-collection", "version": 1, "model": MODEL, "metric": "cosine"}
HEADER = {**NO_HEADER, "spaces": SPACES}


def exported(collection: Collection, format: Format) -> bytes:  # noqa: A002
    file = io.BytesIO()
    assert export_records(collection, file, format=format) == collection.count()
    return file.getvalue()


def imported(collection: Collection, content: bytes, format: Format) -> dict[str, int]:  # noqa: A002
    return import_records(collection, io.BytesIO(content), format=format, source="f")


def contents(collection: Collection) -> list[tuple[object, ...]]:
    """All that an export keeps, in order; vectors as their bytes."""
    found = []
    for shown in collection.scroll(limit=1_000_000).records:
        each = collection.get(shown.id, with_vectors=True)
        try:
            thumbnail = collection.thumbnail(each.id)
        except RecordNotFound:
            thumbnail = None
        stored = {space: vector.tobytes() for space, vector in each.vectors.items()}
        # As JSON, because 1 == 1.0 == True and 0.0 == -0.0.
        metadata = json.dumps(each.metadata, sort_keys=True)
        found.append((each.id, metadata, each.content_hash, stored, thumbnail))
    return found


TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
RECORDS = st.builds(
    NewRecord,
    id=TEXTS,
    # Every finite float32, subnormals and minus zero too.
    vectors=st.fixed_dictionaries(
        {
            "id": arrays.arrays(
                np.float32, 3, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
            ).filter(np.any),
            "b-2": arrays.arrays(np.float32, 1, elements=st.just(np.float32(1))),
        }
    ),
    metadata=st.dictionaries(TEXTS, JSON_VALUES, max_size=3),
    content_hash=st.none() | TEXTS,
    thumbnail=st.none() | st.binary(max_size=20),
)


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(batches=st.lists(st.lists(RECORDS, max_size=8, unique_by=lambda new: new.id), max_size=2))
def test_what_went_out_comes_in_equal(
    format: Format,  # noqa: A002
    batches: list[list[NewRecord]],
) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        CollectionSet(Path(folder)) as collections,
    ):
        collection = collections.create("a", spaces={"id": 3, "b-2": 1}, model="모델")
        for batch in batches:
            collection.upsert(batch)
        file = io.BytesIO(exported(collection, format))
        counts = import_new(collections, "b", file, format=format)
        copy = collections.get("b")
        assert counts == {"created": collection.count(), "updated": 0, "unchanged": 0}
        assert (copy.model, copy.spaces) == (collection.model, collection.spaces)
        assert contents(copy) == contents(collection)


@pytest.mark.parametrize("format", FORMATS)
def test_every_kind_of_float_comes_back_bit_for_bit(
    collections: CollectionSet,
    format: Format,  # noqa: A002
) -> None:
    # The first is the one that its shortest decimal, read through float64, misses.
    bits = np.array([0x15AE43FD, 0x80000000, 1, 0x007FFFFF, 0x7F7FFFFF, 0x80000001], np.uint32)
    random = np.random.default_rng(0).integers(0, 2**32, 60_000, dtype=np.uint32)
    odd = np.concatenate([bits, random]).view(np.float32)
    odd = odd[np.isfinite(odd)][:59_000]
    collection = collections.create("a", spaces={"cls": len(odd)}, model=MODEL)
    collection.upsert([NewRecord("x", {"cls": odd})])
    import_new(collections, "b", io.BytesIO(exported(collection, format)), format=format)
    back = collections.get("b").get("x", with_vectors=True).vectors["cls"]
    np.testing.assert_array_equal(back.view(np.uint32), odd.view(np.uint32))


@pytest.mark.parametrize("format", FORMATS)
def test_more_than_a_batch_and_again(
    collections: CollectionSet,
    collection: Collection,
    format: Format,  # noqa: A002
) -> None:
    fill(collection, 1300)  # more than a batch, and many pages
    collection.upsert([replace(record("r7", 9000), thumbnail=b"small")])
    content, steps = exported(collection, format), list[int]()
    out = list[int]()
    export_records(collection, io.BytesIO(), format=format, progress=out.append)
    assert sum(out) == 1300
    counts = import_new(collections, "b", io.BytesIO(content), format=format, progress=steps.append)
    assert counts == {"created": 1300, "updated": 0, "unchanged": 0}
    assert steps == [1000, 300]
    copy = collections.get("b")
    assert contents(copy) == contents(collection)
    copy.upsert([record("r3", 9001), record("new")])
    copy.delete(["r5"])
    assert imported(copy, content, format) == {"created": 1, "updated": 1, "unchanged": 1298}
    assert copy.count() == 1301


@pytest.mark.parametrize("format", FORMATS)
def test_another_model_or_other_spaces(
    collections: CollectionSet,
    collection: Collection,
    format: Format,  # noqa: A002
) -> None:
    fill(collection, 2)
    content = exported(collection, format)
    other = collections.create("other-model", spaces=SPACES, model="sha256:other")
    with pytest.raises(ModelMismatch, match=f"f holds .*{MODEL}.*'sha256:other'.*'other-model'"):
        imported(other, content, format)
    larger = collections.create("larger", spaces={"cls": 5, "copy": 6}, model=MODEL)
    with pytest.raises(InvalidVector, match=r"f has spaces .*4.*'larger' has .*5"):
        imported(larger, content, format)
    with pytest.raises(CollectionExists, match="'larger'"):
        import_new(collections, "larger", io.BytesIO(content), format=format)
    with pytest.raises(InvalidName):
        import_new(collections, "No Name", io.BytesIO(content), format=format)
    assert (other.count(), larger.count()) == (0, 0)
    other.close()
    with pytest.raises(CollectionNotFound, match="closed"):
        export_records(other, io.BytesIO(), format=format)


def test_unknown_formats_are_named(collection: Collection) -> None:
    unknown: Any = "csv"
    with pytest.raises(FormatUnavailable, match="'csv'; there are jsonl, parquet"):
        export_records(collection, io.BytesIO(), format=unknown)
    with pytest.raises(FormatUnavailable, match="'csv'"):
        import_records(collection, io.BytesIO(), format=unknown)


def test_an_export_while_records_change(collection: Collection) -> None:
    fill(collection, 600)

    def change(count: int) -> None:
        collection.delete([f"r{number}" for number in range(200, 300)])
        collection.upsert([record("r599", 7000), record("late", 1)])

    file = io.BytesIO()
    assert export_records(collection, file, format="jsonl", progress=change) == 501
    lines = [json.loads(line) for line in file.getvalue().splitlines()]
    ids = [line["id"] for line in lines[1:-1]]
    assert len(set(ids)) == len(ids) == 501
    assert lines[-1] == {"records": 501}
    assert ids[-1] == "late"
    assert lines[-3]["vectors"]["cls"] == pytest.approx(vectors(7000)["cls"].tolist())


# JSON lines


def line(id: str = "a", **fields: object) -> dict[str, object]:  # noqa: A002
    given = {space: vector.tolist() for space, vector in vectors(1).items()}
    return {"id": id, "vectors": given, **fields}


def text(*lines: object) -> bytes:
    return b"".join(
        each if isinstance(each, bytes) else json.dumps(each).encode() + b"\n" for each in lines
    )


def test_the_lines_are_plain(collection: Collection) -> None:
    new = NewRecord("ü", {"cls": [1, 0.1, -2, 0], "copy": np.ones(6)}, {"a": "日"}, "h", b"\xff")
    collection.upsert([new])
    stored = collection.get("ü")
    assert exported(collection, "jsonl").decode().splitlines() == [
        json.dumps(HEADER),
        '{"id": "ü", "metadata": {"a": "日"}, "content_hash": "h", '
        f'"created_at": {stored.created_at!r}, "updated_at": {stored.updated_at!r}, '
        '"thumbnail": "/w==", '
        '"vectors": {"cls": [1,0.100000001,-2,0.0], "copy": [1,1,1,1,1,1]}}',
        '{"records": 1}',
    ]


def test_lines_by_hand_need_an_id_and_vectors(collection: Collection) -> None:
    content = b"\xef\xbb\xbf" + text(
        HEADER, b"\r\n", line("a"), line("b", metadata={"x": 1}, thumbnail="", updated_at="?")
    ).replace(b"\n", b"\r\n")
    content += b'\n  {"records": 2}'
    assert imported(collection, content, "jsonl")["created"] == 2
    assert collection.get("b").metadata == {"x": 1}
    assert collection.thumbnail("b") == b""
    np.testing.assert_array_equal(
        collection.get("a", with_vectors=True).vectors["cls"], vectors(1)["cls"]
    )


BAD_HEADERS: list[tuple[object, str]] = [
    (b"", "f: it is empty"),
    (b" \n\n", "f: it is empty"),
    (line(), 'f, line 1: expected a header with "format": "dinoscope-collection"'),
    (HEADER | {"version": 2}, "f, line 1: its format is version 2 .*upgrading"),
    (NO_HEADER, "f, line 1: 'spaces' missing"),
    (HEADER | {"colour": 1}, r"f, line 1: unknown keys 'colour'; there may be \['format'"),
    (HEADER | {"model": ""}, "f, line 1: model must be"),
    (HEADER | {"metric": 3}, "f, line 1: metric must be"),
    (HEADER | {"spaces": [4]}, "f, line 1: spaces must map"),
    (HEADER | {"spaces": {"cls": "4"}}, "f, line 1: space 'cls': expected a dimension"),
    (HEADER | {"spaces": {"C": 4}}, "f, line 1: a name must be"),
    ([HEADER], "f, line 1: expected a JSON object, got list"),
    (json.dumps(HEADER).encode("utf-16"), "f, line 1, where the file ends: not UTF-8: "),
]


@pytest.mark.parametrize(("header", "message"), BAD_HEADERS)
def test_headers_that_cannot_be(collections: CollectionSet, header: object, message: str) -> None:
    with pytest.raises(ImportFailed, match=f"^{message}"):
        import_new(collections, "b", io.BytesIO(text(header)), format="jsonl", source="f")
    assert collections.names() == []


def deep() -> bytes:
    return b'{"id": ' + b"[" * 100_000 + b"\n"


WHOLE = json.dumps(line("c")).encode()
BAD_LINES: list[tuple[object, str]] = [
    (b"{\n", r"line 4: not JSON: Expecting property name .*, at character 3"),
    (WHOLE[:-30], "line 4, where the file ends: not JSON: "),
    (b'{"id": "\xff"}\n', "line 4: not UTF-8: .*, at byte 9"),
    (deep(), "line 4: nested too deeply"),
    (b"7" * 5000 + b"\n", "line 4: .*limit"),
    ([1], "line 4: expected a JSON object, got list"),
    ({"id": "c"}, "line 4: 'vectors' missing"),
    ({}, "line 4: 'id', 'vectors' missing"),
    (line("c", vector=[], label="x"), "line 4: unknown keys 'label', 'vector'; there may be"),
    (b'{"id": "c", "id": "d", "vectors": {}}\n', "line 4: the key 'id' stands there twice"),
    (line("a"), "line 4: the id 'a' stands there a second time"),
    (line(""), "line 4: an id must be"),
    (line("c") | {"id": 7}, "line 4: an id must be"),
    (line("\ud800"), "line 4: an id must be"),
    (line("c", metadata=None), "line 4: record 'c': metadata must be a JSON object"),
    (line("c", metadata={"a": "\ud800"}), "line 4: record 'c': metadata"),
    (line("c", content_hash=3), "line 4: record 'c': content_hash"),
    (line("c", thumbnail=3), "line 4: thumbnail must be base64, got int"),
    (line("c", thumbnail="a b"), "line 4: thumbnail is not base64"),
    (line("c", thumbnail="ü"), "line 4: thumbnail is not base64"),
    (line("c", vectors=[]), "line 4: vectors must map"),
    (line("c", vectors={"cls": [1, 2, 3, 4]}), r"line 4: record 'c': expected .*'copy'"),
    *(
        (line("c", vectors={"cls": wrong, "copy": [1] * 6}), f"line 4: {message}")
        for wrong, message in (
            ("1234", "the vector of space 'cls' is not a list of numbers"),
            ([1, 2, 3, "4"], "the vector of space 'cls' is not a list of numbers"),
            ([1, 2, 3, True], "the vector of space 'cls' is not a list of numbers"),
            ([1, 2, 3, None], "the vector of space 'cls' is not a list of numbers"),
            ([1, 2, 3], r"record 'c', space 'cls': expected shape \[4\], got \[3\]"),
            ([], r"record 'c', space 'cls': expected shape \[4\], got \[0\]"),
            ([0, 0, 0, -0.0], "record 'c', space 'cls': .*zeros"),
            ([1, 2, 3, 1e39], "record 'c', space 'cls': .*infinity"),
            ([1, 2, 3, 10**400], "space 'cls': .*too large"),
            ([1, 2, 3, float("nan")], "NaN is not JSON"),
            ([1, 2, 3, float("-inf")], "-Infinity is not JSON"),
        )
    ),
    ({"records": 3}, "line 4: it counts 3 records, not 2"),
    ({"records": "2"}, "line 4: it counts '2' records, not 2"),
    (text({"records": 2}, b"\n", line("c")), "line 6: it stands after the line that counts"),
    (b"", r'its last line, \{"records": 2\}, is missing: the file was cut short'),
]


@pytest.mark.parametrize(("bad", "message"), BAD_LINES, ids=[message for _, message in BAD_LINES])
def test_lines_that_cannot_be(collection: Collection, bad: object, message: str) -> None:
    content = text(HEADER, line("a"), line("b"), bad)
    with pytest.raises(ImportFailed, match="(?s)^f[,:] " + message) as raised:
        imported(collection, content, "jsonl")
    assert str(raised.value).endswith("The 2 records before that are in collection 'pictures'")
    assert collection.count() == 2
    # Put right, the same file goes in, and what was there already is left alone.
    good = text(HEADER, line("a"), line("b"), line("c"), {"records": 3})
    assert imported(collection, good, "jsonl") == {"created": 1, "updated": 0, "unchanged": 2}


def test_a_line_without_end_is_not_read(collection: Collection) -> None:
    class Endless(io.BytesIO):
        def readline(self, size: int | None = -1, /) -> bytes:
            assert size == MAX_LINE_BYTES + 1
            return b" " * size

    with pytest.raises(ImportFailed, match=f"line 1: it is longer than {MAX_LINE_BYTES} bytes"):
        import_records(collection, Endless(), format="jsonl")


def test_every_cut_is_noticed(collections: CollectionSet, collection: Collection) -> None:
    collection.upsert([replace(record(f"r{i}", i, a=[1, "x"]), thumbnail=b"t") for i in range(2)])
    content = exported(collection, "jsonl")
    other = create(collections, "b")
    # The end of the last line may go: nothing is lost with it.
    for length in range(len(content) - 1):
        with pytest.raises(ImportFailed):
            imported(other, content[:length], "jsonl")
    assert contents(other) == contents(collection)
    assert imported(other, content[:-1], "jsonl")["unchanged"] == 2


# Parquet


def test_the_columns_are_plain(collection: Collection) -> None:
    given = fill(collection, 3)
    collection.upsert([replace(record("r1", 1, number=5), thumbnail=b"small")])
    table = parquet.read_table(io.BytesIO(exported(collection, "parquet")))
    assert table.column_names == [
        *("id", "metadata", "content_hash", "thumbnail", "created_at", "updated_at"),
        *("vector_cls", "vector_copy"),
    ]
    assert table["id"].to_pylist() == ["r0", "r1", "r2"]
    assert json.loads(table["metadata"][1].as_py()) == {"number": 5}
    assert table["thumbnail"].to_pylist() == [None, b"small", None]
    assert table.schema.field("vector_copy").type == pyarrow.list_(pyarrow.float32(), 6)
    assert table["vector_copy"][2].as_py() == np.asarray(given[2].vectors["copy"]).tolist()
    assert table["created_at"][0].as_py() == collection.get("r0").created_at
    assert json.loads(table.schema.metadata[b"dinoscope-collection"]) == HEADER


def test_long_vectors_make_small_row_groups(collections: CollectionSet) -> None:
    wide = collections.create("w", spaces={"cls": 65_536, "b": 65_536}, model=MODEL)
    wide.upsert(
        [NewRecord(str(i), {"cls": np.ones(65_536), "b": np.ones(65_536)}) for i in range(130)]
    )
    file = parquet.ParquetFile(io.BytesIO(exported(wide, "parquet")))
    groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    assert groups == [128, 2]


def rewritten(content: bytes, change: Callable[[Any], Any], count: str | None = None) -> bytes:
    """An export whose table went through `change`."""
    table, file = change(parquet.read_table(io.BytesIO(content))), io.BytesIO()
    with parquet.ParquetWriter(file, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"dinoscope-records": count or str(table.num_rows)})
    return file.getvalue()


def with_column(name: str, values: list[object], kind: Any) -> Callable[[Any], Any]:
    def change(table: Any) -> Any:
        place = table.schema.get_field_index(name)
        return table.set_column(place, pyarrow.field(name, kind), pyarrow.array(values, kind))

    return change


CLS = pyarrow.list_(pyarrow.float32(), 4)
# what is done to a table, the records that go in before the fault is met, and the error
BAD_TABLES: list[tuple[Callable[[Any], Any], int, str]] = [
    (lambda t: t.append_column("x", t["id"]), 0, r"unknown columns \['x'\]; there may be \['id'"),
    (lambda t: t.drop(["vector_copy"]), 0, "expected one column 'vector_copy', got 0"),
    (lambda t: t.append_column("id", t["id"]), 0, "expected one column 'id', got 2"),
    (with_column("id", [1, 2, 3], pyarrow.int64()), 0, "column 'id' to be string, got int64"),
    (lambda t: t.replace_schema_metadata({}), 0, "schema's metadata to hold"),
    (
        lambda t: t.replace_schema_metadata({"dinoscope-collection": "{"}),
        0,
        "'dinoscope-collection' in the schema's metadata: not JSON",
    ),
    (
        with_column("vector_cls", [[1] * 4] * 3, pyarrow.list_(pyarrow.float64(), 4)),
        0,
        r"column 'vector_cls' to be .*float.*\[4\], got .*double",
    ),
    (with_column("id", ["r0", "r0", "c"], pyarrow.string()), 1, "row 2: the id 'r0' .*second"),
    (with_column("id", ["a", None, "c"], pyarrow.string()), 1, "row 2: an id must be .*None"),
    (with_column("metadata", ["{}", None, "{}"], pyarrow.string()), 1, "row 2: metadata is null"),
    (with_column("metadata", ["{}", "{}", "[]"], pyarrow.string()), 2, "row 3, metadata: .*list"),
    (with_column("metadata", ["{", "{}", "{}"], pyarrow.string()), 0, "row 1, metadata: not JSON"),
    (
        with_column("vector_cls", [[1] * 4, None, [1] * 4], CLS),
        1,
        "row 2: record 'r1', space 'cls': .*NaN",
    ),
    (
        with_column("vector_cls", [[1] * 4, [1] * 4, [1, None, 1, 1]], CLS),
        2,
        "row 3: record 'r2', space 'cls': .*NaN",
    ),
    (
        with_column("vector_cls", [[0] * 4] * 3, CLS),
        0,
        "row 1: record 'r0', space 'cls': .*zeros",
    ),
]


@pytest.mark.parametrize(("change", "before", "message"), BAD_TABLES)
def test_tables_that_cannot_be(
    collections: CollectionSet,
    collection: Collection,
    change: Callable[[Any], Any],
    before: int,
    message: str,
) -> None:
    fill(collection, 3)
    other = create(collections, "b")
    with pytest.raises(ImportFailed, match=r"^f[,:].*" + message):
        imported(other, rewritten(exported(collection, "parquet"), change), "parquet")
    assert other.count() == before


def test_parquet_that_is_not_whole(collections: CollectionSet, collection: Collection) -> None:
    fill(collection, 300)
    content, other = exported(collection, "parquet"), create(collections, "b")
    for damaged in (b"", b"PAR1", content[:-100], content[: len(content) // 2], b"{}" * 50):
        with pytest.raises(ImportFailed, match=r"^f: not a whole Parquet file"):
            imported(other, damaged, "parquet")
    # Bytes of a vector: only the checksum tells.
    place = content.index(vectors(299)["cls"].tobytes())
    garbled = content[:place] + b"\xa5" + content[place + 1 :]
    with pytest.raises(ImportFailed, match=r"^f, after row .*: not a whole Parquet file"):
        imported(other, garbled, "parquet")
    with pytest.raises(ImportFailed, match=r"'dinoscope-records' to be 300.*not come to its end"):
        imported(other, rewritten(content, lambda table: table, count="301"), "parquet")
    assert other.count() == 0


def test_a_parquet_export_that_failed_does_not_pass_for_whole(
    collections: CollectionSet, collection: Collection
) -> None:
    fill(collection, 5)
    file = io.BytesIO()

    def fail(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_records(collection, file, format="parquet", progress=fail)
    with pytest.raises(ImportFailed, match="did not come to its end"):
        imported(create(collections, "b"), file.getvalue(), "parquet")


def test_without_pyarrow(collection: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(collection, 1)
    content = exported(collection, "parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(FormatUnavailable, match=r"pip install 'dinoscope\[parquet\]'"):
        export_records(collection, io.BytesIO(), format="parquet")
    with pytest.raises(FormatUnavailable, match="pyarrow"):
        imported(collection, content, "parquet")
    assert imported(collection, exported(collection, "jsonl"), "jsonl")["unchanged"] == 1


def test_pyarrow_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, index.transfer; sys.exit('pyarrow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, timeout=60)
