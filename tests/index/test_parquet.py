"""Exports as Parquet: their columns, and every way in which one can be wrong."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from index.collection import Collection, NewRecord
from index.collection_set import CollectionSet
from index.errors import FormatUnavailable, ImportFailed
from index.transfer import export_records
from tests.index.exports import HEADER, exported, imported
from tests.index.helpers import MODEL, REPOSITORY, create, fill, record, vectors

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


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
