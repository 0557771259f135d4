"""Exports as JSON lines: their text, and every way in which one can be wrong."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest

from index import jsonl
from index.collection import Collection, NewRecord
from index.collection_set import CollectionSet
from index.errors import ImportFailed, InvalidRecord
from index.jsonl import MAX_LINE_BYTES
from index.transfer import import_new, import_records
from tests.index.exports import HEADER, NO_SPACES, contents, exported, imported, line, text
from tests.index.helpers import create, record, vectors


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
    (NO_SPACES, "f, line 1: 'spaces' missing"),
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


def test_a_record_too_long_for_a_line_is_not_written(
    collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection.upsert([replace(record("long", 1), thumbnail=bytes(3000))])
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 3000)
    with pytest.raises(InvalidRecord, match=r"'long' takes 4\d\d\d bytes; .* may have 3000"):
        exported(collection, "jsonl")


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
