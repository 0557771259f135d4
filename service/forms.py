"""Multipart forms: their parts, in the order in which they came."""

import re
from dataclasses import dataclass, field

import anyio.to_thread
from fastapi import Request
from multipart import MultipartError, MultipartSegment, PushMultipartParser
from starlette.requests import ClientDisconnect

from service.errors import RequestError

_QUICKLY_JOINED = 2**20  # bytes that the event loop may put together itself
_MAX_TEXT_BYTES = 2**20  # of one part that is no file
# As clients write it, which is not always as the RFCs would have it: unquoted, with any character.
_BOUNDARY = re.compile(r';[ \t]*boundary[ \t]*=[ \t]*(?:"([^"]*)"|([^;]*))', re.IGNORECASE)
_FILENAME = re.compile(r";[ \t]*filename\*?[ \t]*=", re.IGNORECASE)


class TooManyFiles(Exception):
    """A form has more files than are allowed in it."""


@dataclass
class Part:
    """One part of a form.

    Attributes:
        name: of the field.
        is_file: whether the part has the name of a file.
        size: bytes that have come.
    """

    name: str
    is_file: bool
    size: int = 0
    _pieces: list[bytes] = field(default_factory=list)

    def add(self, piece: bytes) -> None:
        """The next bytes of it.

        Raises:
            RequestError: a text that has become too long.
        """
        self.size += len(piece)
        if not self.is_file and self.size > _MAX_TEXT_BYTES:
            raise _unreadable(f"the field {self.name!r} is longer than {_MAX_TEXT_BYTES} bytes")
        self._pieces.append(piece)

    async def read(self) -> bytes:
        """All of it, once: the part lets go of it, for a form holds no more than it must."""
        pieces, self._pieces = self._pieces, []
        if self.size <= _QUICKLY_JOINED:
            return b"".join(pieces)
        return await anyio.to_thread.run_sync(b"".join, pieces)

    async def text(self) -> str:
        """As `read`, for a part that is no file.

        Raises:
            RequestError: bytes that are not UTF-8.
        """
        try:
            return (await self.read()).decode()
        except UnicodeDecodeError as error:
            raise _unreadable(f"the field {self.name!r} is not UTF-8: {error}") from error


async def read_form(request: Request, *, max_files: int, max_texts: int) -> list[Part]:
    """The parts of a body that says it is `multipart/form-data`, kept in memory.

    Raises:
        TooManyFiles: more than `max_files`.
        ClientDisconnect: the client went away.
        RequestError: a body that is no such form, or with more than `max_texts` other parts.
    """
    told = _BOUNDARY.search(request.headers["content-type"])
    boundary = "" if told is None else (told[1] or told[2] or "").strip()
    parts: list[Part] = []
    files, has_more = 0, True
    try:
        # Names of files may be in any encoding, and are not used.
        with PushMultipartParser(boundary.encode("latin-1"), header_charset="latin-1") as parser:
            while has_more:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                body, has_more = message.get("body", b""), message.get("more_body", False)
                for event in parser.parse(body) if body else ():
                    if isinstance(event, MultipartSegment):
                        is_file = _is_file(event)
                        files += is_file
                        if files > max_files:
                            raise TooManyFiles
                        if len(parts) - files >= max_texts:
                            raise _unreadable(f"it has more than {max_texts} fields that are texts")
                        name = event.name.encode("latin-1", "replace").decode(errors="replace")
                        parts.append(Part(name, is_file))
                    elif event:
                        parts[-1].add(event)
    except MultipartError as error:
        raise _unreadable(error.args[0]) from error
    return parts


def _is_file(segment: MultipartSegment) -> bool:
    """Whether a part has the name of a file, however that is written."""
    return segment.filename is not None or bool(
        _FILENAME.search(segment.header("Content-Disposition", ""))
    )


def _unreadable(why: str) -> RequestError:
    return RequestError(f"the form cannot be read: {why}", code="invalid_form")
