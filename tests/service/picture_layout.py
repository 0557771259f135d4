"""Where a picture's file has its segments, lengths and sizes, however damaged it is already."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Number:
    """An unsigned number in a file."""

    at: int
    width: int
    order: Literal["big", "little"]

    def read(self, content: bytes | bytearray) -> int:
        return int.from_bytes(content[self.at : self.at + self.width], self.order)

    def write(self, content: bytearray, value: int) -> None:
        value %= 256**self.width
        content[self.at : self.at + self.width] = value.to_bytes(self.width, self.order)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A chunk, box, block or directory entry: from, to, its name, and the number of its length."""

    start: int
    end: int
    kind: bytes
    length: Number | None


def segments(content: bytes) -> list[Segment]:
    """The parts that the file's format has, as far as they can be followed."""
    found = (_png, _jpeg, _riff, _boxes, _gif, _tiff)
    starts = (b"\x89PNG", b"\xff\xd8", b"RIFF", b"ftyp", b"GIF", b"II*\x00")
    for start, walk in zip(starts, found, strict=True):
        at = 4 if start == b"ftyp" else 0
        if content[at : at + len(start)] == start:
            return [s for s in walk(content) if s.end <= len(content)]
    return []


def sizes(content: bytes) -> list[Number]:
    """The numbers that say how wide and high the picture is."""
    parts = segments(content)
    if content.startswith(b"\x89PNG"):
        found = _numbers(16, (0, 4), 4, "big")
    elif content.startswith(b"GIF"):
        blocks = [s for s in parts if s.kind == b","]
        found = _numbers(6, (0, 2), 2, "little")
        found += [n for s in blocks for n in _numbers(s.start + 5, (0, 2), 2, "little")]
    elif content.startswith(b"BM"):
        found = _numbers(18, (0, 4), 4, "little")
    elif content.startswith(b"\xff\xd8"):
        frames = [s for s in parts if s.kind[0] & 0xF0 == 0xC0 and s.kind[0] not in (0xC4, 0xCC)]
        found = [n for s in frames for n in _numbers(s.start + 5, (0, 2), 2, "big")]
    elif content.startswith(b"RIFF"):
        found = []
        for part in parts:
            if part.kind == b"VP8X":
                found += _numbers(part.start + 12, (0, 3), 3, "little")
            elif part.kind == b"VP8 ":
                found += _numbers(part.start + 14, (0, 2), 2, "little")
            elif part.kind == b"VP8L":
                found += _numbers(part.start + 9, (0,), 4, "little")
            elif part.kind == b"ANMF":
                found += _numbers(part.start + 14, (0, 3), 3, "little")
    elif content.startswith(b"II*\x00"):
        entries = [s for s in parts if s.kind in (b"\x00\x01", b"\x01\x01", b"\x16\x01")]
        found = [Number(at=s.start + 8, width=4, order="little") for s in entries]
    else:
        at = content.find(b"ispe")
        found = _numbers(at + 8, (0, 4), 4, "big") if at >= 0 else []
    return [n for n in found if n.at + n.width <= len(content)]


def _numbers(
    base: int, offsets: tuple[int, ...], count: int, order: Literal["big", "little"]
) -> list[Number]:
    return [Number(at=base + offset, width=count, order=order) for offset in offsets]


def _png(content: bytes) -> Iterator[Segment]:
    at = 8
    while at + 12 <= len(content):
        length = Number(at=at, width=4, order="big")
        end = at + 12 + length.read(content)
        yield Segment(start=at, end=end, kind=content[at + 4 : at + 8], length=length)
        at = end


def _jpeg(content: bytes) -> Iterator[Segment]:
    at = 2
    while at + 4 <= len(content) and content[at] == 0xFF:
        length = Number(at=at + 2, width=2, order="big")
        end = at + 2 + length.read(content)
        if content[at + 1] == 0xDA:  # the scan goes to the next marker
            end = next(
                (
                    i
                    for i in range(end, len(content) - 1)
                    if content[i] == 0xFF and content[i + 1] not in (0, *range(0xD0, 0xD8))
                ),
                len(content),
            )
        yield Segment(start=at, end=end, kind=content[at + 1 : at + 2], length=length)
        at = max(end, at + 2)


def _riff(content: bytes) -> Iterator[Segment]:
    at = 12
    while at + 8 <= len(content):
        length = Number(at=at + 4, width=4, order="little")
        size = length.read(content)
        end = at + 8 + size + size % 2
        yield Segment(start=at, end=end, kind=content[at : at + 4], length=length)
        at = end


def _boxes(content: bytes) -> Iterator[Segment]:
    at, ends = 0, [len(content)]
    inside = {b"meta": 12, b"iprp": 8, b"ipco": 8, b"moov": 8, b"trak": 8, b"mdia": 8}
    while at + 8 <= len(content):
        length = Number(at=at, width=4, order="big")
        kind, end = content[at + 4 : at + 8], at + max(8, length.read(content))
        yield Segment(start=at, end=end, kind=kind, length=length)
        if kind in inside:
            ends.append(end)
            at += inside[kind]
        else:
            at = end


def _gif(content: bytes) -> Iterator[Segment]:
    if len(content) < 13:
        return
    flags = content[10]
    at = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
    while at < len(content):
        start, kind = at, content[at : at + 1]
        if kind == b"," and at + 10 < len(content):
            flags = content[at + 9]
            at += 11 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
        elif kind == b"!":
            at += 2
        else:
            return
        length = Number(at=at, width=1, order="little")
        while at < len(content) and content[at]:
            at += 1 + content[at]
        at += 1
        yield Segment(start=start, end=at, kind=kind, length=length)


def _tiff(content: bytes) -> Iterator[Segment]:
    if len(content) < 8:
        return
    (directory,) = struct.unpack_from("<I", content, 4)
    if directory + 2 > len(content):
        return
    (count,) = struct.unpack_from("<H", content, directory)
    for i in range(min(count, 200)):
        at = directory + 2 + 12 * i
        length = Number(at=at + 4, width=4, order="little")
        yield Segment(start=at, end=at + 12, kind=content[at : at + 2], length=length)
