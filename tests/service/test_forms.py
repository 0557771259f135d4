from collections.abc import Sequence

import httpx
import pytest
from fastapi import Request
from starlette.types import Message

from service.errors import RequestError
from service.forms import Part, TooManyFiles, read_form
from tests.service.answers import error_of, json_of
from tests.service.pictures import png

pytestmark = pytest.mark.anyio
FORM = (
    b'--x\r\nContent-Disposition: form-data; name="image"; filename="a \xc3\xa4.png"\r\n'
    b"Content-Type: image/png\r\n\r\n\r\n--y\r\n--\r\n"  # begins like a boundary, and is none
    b'--x\r\nContent-Disposition: form-data; name="id"\r\n\r\n\xc3\xa4\r\n'
    b'--x\r\ncontent-disposition: form-data; name=image; filename=""\r\n\r\n\r\n'
    b"--x--\r\n"
)
TEXT = b'--x\r\nContent-Disposition: form-data; name="id"\r\n\r\n'


def request_of(pieces: Sequence[bytes], kind: str = "multipart/form-data; boundary=x") -> Request:
    messages: list[Message] = [
        {"type": "http.request", "body": piece, "more_body": True} for piece in pieces
    ]
    messages.append({"type": "http.request"})

    async def receive() -> Message:
        return messages.pop(0)

    return Request({"type": "http", "headers": [(b"content-type", kind.encode())]}, receive)


async def parts_of(*pieces: bytes, files: int = 2, texts: int = 2) -> list[Part]:
    return await read_form(request_of(pieces), max_files=files, max_texts=texts)


async def test_parts_in_their_order_wherever_the_body_is_cut() -> None:
    cut = [(FORM[:at], FORM[at:]) for at in range(len(FORM))]
    for pieces in [(FORM,), *cut, tuple(FORM[i : i + 1] for i in range(len(FORM)))]:
        one, text, other = await parts_of(*pieces)
        assert [(part.name, part.is_file) for part in (one, text, other)] == [
            ("image", True),
            ("id", False),
            ("image", True),
        ]
        assert one.size == 9
        assert await one.read() == b"\r\n--y\r\n--"
        assert await text.text() == "ä"
        assert await other.read() == b""


async def test_a_part_is_read_once_and_then_let_go() -> None:
    part = Part("image", is_file=True)
    for _ in range(3):
        part.add(b"ab" * 2**19)
    assert await part.read() == b"ab" * 3 * 2**19
    assert await part.read() == b""


async def test_more_than_is_allowed() -> None:
    with pytest.raises(TooManyFiles):
        await parts_of(FORM, files=1)
    assert len(await parts_of(FORM, texts=1)) == 3
    with pytest.raises(RequestError, match="more than 0 fields that are texts"):
        await parts_of(FORM, texts=0)
    assert len(await parts_of(TEXT, b"a" * 2**20, b"\r\n--x--")) == 1
    with pytest.raises(RequestError, match="the field 'id' is longer than 1048576 bytes"):
        await parts_of(TEXT, b"a" * 2**20, b"a\r\n--x--")


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (FORM[:-6], "end"),
        (b"", "end"),
        (b"nonsense", "end"),
        (b"--x\n" + FORM[5:], "line break"),
        (b"--x\r\nContent-Type: image/png\r\n\r\na\r\n--x--", "Content-Disposition"),
        (b"--x\r\nnonsense\r\n\r\na\r\n--x--", "header"),
        (b"--x\r\n" + b"A: b\r\n" * 20 + FORM[5:], "header count"),
        (b"--x\r\nA: " + b"b" * 10_000 + b"\r\n" + FORM[5:], "header length"),
    ],
)
async def test_what_is_no_form(body: bytes, why: str) -> None:
    with pytest.raises(RequestError, match=why) as caught:
        await parts_of(body)
    assert caught.value.code == "invalid_form"
    assert str(caught.value).startswith("the form cannot be read: ")


@pytest.mark.parametrize("kind", ["multipart/form-data", 'multipart/form-data; boundary=""'])
async def test_a_boundary_is_needed(kind: str) -> None:
    with pytest.raises(RequestError, match="boundary"):
        await read_form(request_of([FORM], kind), max_files=2, max_texts=2)


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("multipart/form-data; boundary=----=_Part_1_2.3", b"------=_Part_1_2.3"),
        ("multipart/form-data; boundary=a/b ; charset=utf-8", b"--a/b"),
        ("Multipart/Form-Data;\tBOUNDARY=x", b"--x"),
        ("multipart/form-data; boundary=\xe4", b"--\xe4"),
        ('multipart/form-data; x=y; boundary="a b:c"', b"--a b:c"),
    ],
)
async def test_boundaries_as_clients_write_them(kind: str, line: bytes) -> None:
    body = line + FORM[3:-7].replace(b"--x\r\n", line + b"\r\n") + b"\r\n" + line + b"--"
    messages: list[Message] = [{"type": "http.request", "body": body}]

    async def receive() -> Message:
        return messages.pop(0)

    headers = [(b"content-type", kind.encode("latin-1"))]
    request = Request({"type": "http", "headers": headers}, receive)
    parts = await read_form(request, max_files=2, max_texts=1)
    assert [part.name for part in parts] == ["image", "id", "image"]


@pytest.mark.parametrize(
    "name",
    [
        b'filename="\xe4.png"',  # a code page of the client's own
        b'filename="\xc3\xa4.png"',
        b"filename=\xc3\xa4.png",
        b"filename*=utf-8''%C3%A4.png",
        b'FileName = "a;b\\".png"',
        b'filename=""',
    ],
)
async def test_names_of_files_as_clients_write_them(name: bytes) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="\xc3\xa4"; ' + name
    (part,) = await parts_of(head + b"\r\n\r\nabc\r\n--x--")
    assert (part.name, part.is_file, await part.read()) == ("ä", True, b"abc")


async def test_a_text_that_is_not_utf_8(client: httpx.AsyncClient) -> None:
    content = TEXT + b"\xff\r\n--x--"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    response = await client.post("/v1/collections/default/images", content=content, headers=headers)
    error = error_of(response, 400, "invalid_form")
    assert error["message"].startswith("the form cannot be read: the field 'id' is not UTF-8")


async def test_quoted_boundaries_and_odd_names_of_files(client: httpx.AsyncClient) -> None:
    for boundary, name in (("a b:c", "x"), ("'()+_,-./:=?", 'qu"ote\\d; x'), ("z" * 70, "ü" * 300)):
        told = name.replace("\\", "\\\\").replace('"', "%22")
        disposition = f'form-data; name="image"; filename="{told}"'.encode()
        line = b"--" + boundary.encode()
        content = b"\r\n".join(
            [line, b"Content-Disposition: " + disposition, b"", png(1), line + b"--", b""]
        )
        kind = f'multipart/form-data; charset=utf-8; boundary="{boundary}"'
        response = await client.post(
            "/v1/embeddings", content=content, headers={"Content-Type": kind}
        )
        assert len(json_of(response)["data"]) == 1
