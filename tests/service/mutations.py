"""Damage to pictures' files: blind, and with knowledge of their formats."""

import re
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from tests.service.picture_layout import Segment, segments, sizes

Random = np.random.Generator
Mutation = Callable[[Random, bytes, Sequence[bytes]], bytes]

_TELLING = (0, 1, 2, 3, 255, 256, 9_999, 10_001, 30_000, 32_767, 65_535, 2**24 - 1, 2**31 - 1)
_METADATA = re.compile(
    rb"Exif|eXIf|EXIF|ICC_PROFILE|iCCP|ICCP|acsp|mntrRGB|XMP |http://ns|I{2}\*|MM\0\*"
)


def mutate(random: Random, content: bytes, others: Sequence[bytes]) -> tuple[bytes, list[str]]:
    """One to four mutations, and their names; now and then none.

    Args:
        others: whole pictures, to be spliced in.
    """
    names = []
    for _ in range(random.integers(1, 5)):
        if random.random() < 0.02:
            continue
        mutation = MUTATIONS[random.integers(len(MUTATIONS))]
        content = mutation(random, content, others)
        names.append(mutation.__name__)
    if content.startswith(b"\x89PNG") and random.random() < 0.7:
        content = with_right_checksums(content)
        names.append("with_right_checksums")
    return content, names


def flip_bits(random: Random, content: bytes, _: Sequence[bytes]) -> bytes:
    damaged = bytearray(content)
    for at in _places(random, content, int(random.integers(1, 12))):
        damaged[at] ^= 1 << int(random.integers(8))
    return bytes(damaged)


def overwrite(random: Random, content: bytes, _: Sequence[bytes]) -> bytes:
    damaged = bytearray(content)
    for at in _places(random, content, int(random.integers(1, 6))):
        run = int(random.integers(1, 5))
        value = int(random.choice([0, 1, 127, 128, 255, int(random.integers(256))]))
        damaged[at : at + run] = bytes([value]) * len(damaged[at : at + run])
    return bytes(damaged)


def truncate(random: Random, content: bytes, _: Sequence[bytes]) -> bytes:
    near_the_end = random.random() < 0.5
    most = len(content)
    return content[: int(random.integers(max(0, most - 64) if near_the_end else 0, most + 1))]


def add_tail(random: Random, content: bytes, others: Sequence[bytes]) -> bytes:
    tail = random.bytes(int(random.integers(1, 5000)))
    return content + (others[random.integers(len(others))] if random.random() < 0.3 else tail)


def cut_out(random: Random, content: bytes, _: Sequence[bytes]) -> bytes:
    start, length = _slice(random, content)
    return content[:start] + content[start + length :]


def repeat(random: Random, content: bytes, _: Sequence[bytes]) -> bytes:
    start, length = _slice(random, content)
    part = content[start : start + length]
    return content[:start] + part * int(random.integers(2, 5)) + content[start + length :]


def splice(random: Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """The beginning of one picture and the end of another, often of another format."""
    other = others[random.integers(len(others))]
    early = random.random() < 0.5
    at = int(random.integers(0, min(len(content), 200 if early else len(content)) + 1))
    return content[:at] + other[at if random.random() < 0.5 else len(other) // 2 :]


def shuffle_segments(random: Random, content: bytes, _: Sequence[bytes]) -> bytes:
    """Two segments change places, or one is doubled or left out."""
    parts = segments(content)
    if len(parts) < 2:
        return flip_bits(random, content, ())
    one, two = (parts[i] for i in sorted(random.choice(len(parts), 2, replace=False)))
    if one.end > two.start:
        return cut_out(random, content, ())
    first, second = content[one.start : one.end], content[two.start : two.end]
    between, after = content[one.end : two.start], content[two.end :]
    kept = ((second, first), (first, first + second), (b"", second), (second, second))
    left, right = kept[random.integers(len(kept))]
    return content[: one.start] + left + between + right + after


def move_a_segment(random: Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """A segment of another picture of the same format comes in."""
    other = others[random.integers(len(others))]
    theirs, ours = segments(other), segments(content)
    if not theirs or not ours or other[:2] != content[:2]:
        return overwrite(random, content, ())
    part: Segment = theirs[random.integers(len(theirs))]
    at = ours[random.integers(len(ours))].start
    return content[:at] + other[part.start : part.end] + content[at:]


def edit_length(random: Random, content: bytes, _: Sequence[bytes]) -> bytes:
    numbers = [part.length for part in segments(content) if part.length is not None]
    if not numbers:
        return overwrite(random, content, ())
    damaged = bytearray(content)
    number = numbers[random.integers(len(numbers))]
    old = number.read(damaged)
    near = (old - 1, old + 1, old // 2, old * 2, len(content))
    number.write(damaged, int(random.choice(near if random.random() < 0.5 else _TELLING)))
    return bytes(damaged)


def edit_size(random: Random, content: bytes, _: Sequence[bytes]) -> bytes:
    """Width or height says something else."""
    if content[:1] == b"P":
        value = str(random.choice(_TELLING)).encode()
        return (
            re.sub(rb"\d+", lambda m: value if random.random() < 0.4 else m[0], content[:20])
            + content[20:]
        )
    numbers = sizes(content)
    if not numbers:
        return flip_bits(random, content, ())
    damaged = bytearray(content)
    number = numbers[random.integers(len(numbers))]
    old = number.read(damaged)
    near = (old - 1, old + 1, old // 2, old * 2)
    number.write(damaged, int(random.choice(near if random.random() < 0.4 else _TELLING)))
    return bytes(damaged)


def damage_metadata(random: Random, content: bytes, _: Sequence[bytes]) -> bytes:
    """In EXIF, an ICC profile or XMP."""
    found = [match.start() for match in _METADATA.finditer(content)]
    if not found:
        return overwrite(random, content, ())
    damaged = bytearray(content)
    start = found[random.integers(len(found))]
    for _ in range(random.integers(1, 8)):
        at = start + int(random.integers(0, 200))
        if at < len(damaged):
            damaged[at] = int(random.choice([0, 1, 255, int(random.integers(256))]))
    return bytes(damaged)


MUTATIONS: tuple[Mutation, ...] = (
    flip_bits,
    overwrite,
    truncate,
    add_tail,
    cut_out,
    repeat,
    splice,
    shuffle_segments,
    move_a_segment,
    edit_length,
    edit_size,
    damage_metadata,
)


def with_right_checksums(content: bytes) -> bytes:
    """A PNG whose chunks' checksums are right again, so that a reader goes on to what they hold."""
    mended = bytearray(content)
    for part in segments(content):
        inside = content[part.start + 4 : part.end - 4]
        mended[part.end - 4 : part.end] = zlib.crc32(inside).to_bytes(4, "big")
    return bytes(mended)


def _places(random: Random, content: bytes, count: int) -> list[int]:
    """Most of them near the beginning: headers are short and full of meaning."""
    if not content:
        return []
    reach = min(len(content), int(random.choice([40, 400, len(content)])))
    return [int(at) for at in random.integers(0, reach, count)]


def _slice(random: Random, content: bytes) -> tuple[int, int]:
    length = int(2 ** random.uniform(0, 12))
    return int(random.integers(0, len(content) + 1)), length
