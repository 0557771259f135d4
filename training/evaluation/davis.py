"""DAVIS 2017 in its published layout: sequences of frames, and masks as palette PNGs.

JPEGImages/480p/SEQUENCE/00000.jpg      frames
Annotations/480p/SEQUENCE/00000.png     a mask for each: 0 the background, N the N-th object
ImageSets/2017/val.txt                  the sequences, one a line
"""

from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from backbone.pictures import FORMATS
from training.picture_files import is_hidden
from training.sources import DataError

Indices = npt.NDArray[np.uint8]
"""A mask [H, W]: of each pixel the number of its object, 0 for the background."""

FRAMES = PurePath("JPEGImages", "480p")
ANNOTATIONS = PurePath("Annotations", "480p")
VAL = PurePath("ImageSets", "2017", "val.txt")

_LAYOUT = f"expected DAVIS 2017's layout: {FRAMES}/SEQUENCE/00000.jpg, {ANNOTATIONS}/SEQUENCE/"
_LEAST = 3  # frames; the first and the last are not measured
_VOID = 255


class VideoSequence(NamedTuple):
    """One video.

    Attributes:
        name: of its folders.
        frames: JPEG files in their order, at least 3.
        annotations: of each frame, its mask.
        size: width and height in pixels of every frame and mask.
    """

    name: str
    frames: list[Path]
    annotations: list[Path]
    size: tuple[int, int]


def open_davis(root: Path) -> list[VideoSequence]:
    """The sequences of the validation set, all files there and of fitting sizes.

    Raises:
        DataError: names the folder or file, what was found and what was expected.
    """
    for part in (VAL, FRAMES, ANNOTATIONS):
        if not (root / part).exists():
            raise DataError(f"{str(root)!r} has no {part}; {_LAYOUT}00000.png and {VAL}")
    try:
        lines = (root / VAL).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{str(root / VAL)!r} is not text in UTF-8: {error}") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise DataError(f"{str(root / VAL)!r} lists no sequence; expected one a line")
    for name in names:
        if name in (".", "..") or "/" in name or "\\" in name or names.count(name) > 1:
            raise DataError(
                f"{str(root / VAL)!r} lists {name!r}: each line must be the name of one folder in "
                f"{FRAMES}, and stand there once"
            )
    return [_open_sequence(root, name) for name in names]


def read_mask(path: Path, *, size: tuple[int, int]) -> Indices:
    """A palette or 8-bit grey PNG's numbers; 255, void, counts as background, as officially.

    Args:
        size: width and height that it must have.

    Raises:
        DataError: not there, broken, of another size, or with colours instead of numbers; names it.
    """
    check_size(path, size)
    try:
        with Image.open(path, formats=FORMATS) as picture:
            mode = picture.mode
            numbers = np.array(picture)
    except Exception as error:  # Pillow's decoders promise no kinds of errors
        raise DataError(f"mask {str(path)!r} cannot be read: {error}") from error
    if mode not in ("P", "L"):
        raise DataError(
            f"mask {str(path)!r} has mode {mode}; expected a palette (P) or 8-bit grey (L) PNG of "
            "the objects' numbers"
        )
    return np.where(numbers == _VOID, np.uint8(0), numbers)


def write_mask(path: Path, mask: Indices) -> None:
    """Writes a mask as a PNG in the official palette."""
    picture = Image.fromarray(mask)
    picture.putpalette(palette())
    picture.save(path, format="PNG")


def count_objects(sequence: VideoSequence) -> int:
    """The objects to follow: the greatest number in the first mask.

    Raises:
        DataError: the mask cannot be read, or holds none.
    """
    path = sequence.annotations[0]
    count = int(read_mask(path, size=sequence.size).max())
    if count == 0:
        raise DataError(f"mask {str(path)!r} marks no object; the first of a sequence must")
    return count


def palette() -> bytes:
    """The 256 colours of DAVIS and PASCAL VOC, as bytes of red, green and blue.

    The three lowest bits of a number are the highest of its red, green and blue, the next three
    the next, and so on: neighbouring numbers have colours far apart.
    """
    colours = bytearray()
    for number in range(256):
        for channel in range(3):
            bits = ((number >> (3 * place + channel)) & 1 for place in range(3))
            colours.append(sum(bit << (7 - place) for place, bit in enumerate(bits)))
    return bytes(colours)


def check_size(path: Path, size: tuple[int, int]) -> None:
    """Refuses a picture that is not of `size`, by its header.

    Raises:
        DataError: not there, no picture, or of another size; names it.
    """
    found = _size(path)
    if found != size:
        raise DataError(
            f"{str(path)!r} is {found[0]} x {found[1]} pixels; expected {size[0]} x {size[1]}, the "
            "size of the sequence's first frame"
        )


def _open_sequence(root: Path, name: str) -> VideoSequence:
    frames = _files(root / FRAMES / name, ".jpg")
    if len(frames) < _LEAST:
        raise DataError(
            f"{str(root / FRAMES / name)!r} holds {len(frames)} frames (.jpg); a sequence needs at "
            f"least {_LEAST}, as the first and the last are not measured"
        )
    folder = root / ANNOTATIONS / name
    annotations = [folder / f"{frame.stem}.png" for frame in frames]
    for frame, annotation in zip(frames, annotations, strict=True):
        if not annotation.is_file():
            raise DataError(
                f"{str(annotation)!r} is missing: {frame.name}, as each frame, must have a mask"
            )
    if extra := sorted(set(_files(folder, ".png")) - set(annotations)):
        raise DataError(
            f"{str(extra[0])!r} has no frame in {str(root / FRAMES / name)!r}: each mask must have "
            "one"
        )
    size = _size(frames[0])
    for path in (*frames, *annotations):
        check_size(path, size)
    return VideoSequence(name, frames, annotations, size)


def _files(folder: Path, suffix: str) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{str(folder)!r} is no folder; {VAL} lists its sequence")
    # Hidden files beside them are no frames: some file systems keep ._00000.jpg for each.
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() == suffix and not is_hidden(path.name)
    )


def _size(path: Path) -> tuple[int, int]:
    if not path.is_file():
        raise DataError(f"{str(path)!r} does not exist; expected a picture")
    try:
        with Image.open(path, formats=FORMATS) as picture:
            return picture.size
    except Exception as error:  # see `read_mask`
        raise DataError(f"picture {str(path)!r} cannot be read: {error}") from error
