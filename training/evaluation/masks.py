"""Pictures with a mask of their object each: ECSSD's pairs of folders, or VOC12's layout."""

import io
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from backbone.pictures import FORMATS, to_mode
from training.decoding import decode
from training.picture_files import DataError
from training.sources import FolderPictures, Pictures, SomePictures

VOID = 255
"""In VOC's masks: neither object nor background, and left out of both."""

Bools = npt.NDArray[np.bool_]

_GREY_LEVELS = 16  # that channels of a grey picture may be apart, of 255


class ObjectMask(NamedTuple):
    """What is to be found in a picture.

    Attributes:
        inside: the object's pixels, [H, W].
        counted: the pixels that are object or background, [H, W]; `inside` is a part of it.
    """

    inside: Bools
    counted: Bools


class Pair(NamedTuple):
    """A picture, RGB, and its mask of the same size."""

    picture: Image.Image
    mask: ObjectMask


@dataclass(frozen=True)
class Pairs:
    """Pictures and the file of each one's mask.

    Attributes:
        pictures: P of them.
        masks: P files.
        read_mask: how these files tell the object.
        rule: the same in words, for those who read the results.
    """

    pictures: Pictures
    masks: Sequence[Path]
    read_mask: Callable[[Path], ObjectMask]
    rule: str

    def read(self, i: int) -> Pair:
        """Picture and mask `i`.

        Raises:
            DataError: either cannot be read, or they differ in size; names the files.
        """
        name, path = self.pictures.names[i], self.masks[i]
        picture = decode(self.pictures.read(i), name)
        mask = self.read_mask(path)
        height, width = mask.inside.shape
        if (width, height) != picture.size:
            raise DataError(
                f"mask {str(path)!r} has {width} x {height} pixels and its picture {name!r} "
                f"{picture.width} x {picture.height}: a mask must have the size of its picture"
            )
        return Pair(picture, mask)


def open_pairs(images: Path, masks: Path) -> Pairs:
    """The pictures below `images`, and below `masks` the mask of each: the same path but suffix.

    Masks without a picture are not looked at.

    Raises:
        DataError: a folder that is none or holds no picture, a picture without a mask, or a path
            that is there with two suffixes.
    """
    pictures, found = _folder(images), _folder(masks)
    by_stem = {_stem(name): masks / name for name in found.names}
    for where, names in ((images, pictures.names), (masks, found.names)):
        stem, count = Counter(map(_stem, names)).most_common(1)[0]
        if count > 1:
            both = [name for name in names if _stem(name) == stem]
            raise DataError(f"{str(where)!r} holds {both}: a picture has one mask, of its own name")
    for name in pictures.names:
        if _stem(name) not in by_stem:
            raise DataError(
                f"picture {str(images / name)!r} has no mask: expected {_stem(name)!r} with the "
                f"suffix of a picture in {str(masks)!r}, as in 0001.jpg and 0001.png; "
                f"found there {found.names[0]!r} and {len(found.names) - 1} others"
            )
    paths = [by_stem[_stem(name)] for name in pictures.names]
    rule = "object: above 127; in palettes and masks of zeros and ones, not 0"
    return Pairs(pictures, paths, read_mask, rule)


def open_voc(folder: Path) -> Pairs:
    """The validation pictures of VOC12's segmentation: every class is object, void is left out.

    `folder` is VOC2012, with ImageSets/Segmentation/val.txt, JPEGImages, and SegmentationClass or,
    where that is not there, SegmentationObject.

    Raises:
        DataError: a part of this layout that is missing; names it.
    """
    listed = folder / "ImageSets" / "Segmentation" / "val.txt"
    if not listed.is_file():
        raise DataError(
            f"{str(folder)!r} is not of VOC12's layout: it has no ImageSets/Segmentation/val.txt"
        )
    try:
        stems = listed.read_text(encoding="utf-8-sig").split()
    except UnicodeDecodeError as error:
        raise DataError(f"{str(listed)!r} is not text in UTF-8: {error}") from error
    if not stems:
        raise DataError(f"{str(listed)!r} is empty; expected a picture's name on each line")
    pictures = _folder(folder / "JPEGImages")
    places = {_stem(name): i for i, name in enumerate(pictures.names)}
    kinds = ("SegmentationClass", "SegmentationObject")
    kind = next((kind for kind in kinds if (folder / kind).is_dir()), None)
    if kind is None:
        raise DataError(f"{str(folder)!r} has no SegmentationClass, and no SegmentationObject")
    paths = [folder / kind / f"{stem}.png" for stem in stems]
    for stem, path in zip(stems, paths, strict=True):
        if stem not in places:
            raise DataError(f"{str(listed)!r} names {stem!r}, which is not in JPEGImages")
        if not path.is_file():
            raise DataError(f"{str(listed)!r} names {stem!r}, whose mask {str(path)!r} is missing")
    rule = f"object: any index of the palette but 0 and void; void, {VOID}, is left out of both"
    return Pairs(SomePictures(pictures, [places[stem] for stem in stems]), paths, read_voc, rule)


def read_mask(path: Path) -> ObjectMask:
    """A mask that knows one object.

    Object is what a palette's index, or a mask of zeros and ones, has other than 0; in other masks
    what is above 127, of 255, after they have been made grey.

    Raises:
        DataError: a file that cannot be read, that has colours or transparency, or whose brightest
            value is from 2 to 127, so that it is neither of these; names it.
    """
    picture = _open(path)
    if picture.mode == "P":
        inside = np.asarray(picture) != 0
        return ObjectMask(inside, np.ones_like(inside))
    _require_grey(picture, path)
    values = np.asarray(to_mode(picture, "L"))
    brightest = int(values.max())
    if 1 < brightest <= 127:
        raise DataError(
            f"mask {str(path)!r}: its largest value is {brightest}; expected 0 and 255, 0 and 1, "
            "or a palette; save the object as 255"
        )
    inside = values > (127 if brightest > 1 else 0)
    return ObjectMask(inside, np.ones_like(inside))


def _require_grey(picture: Image.Image, path: Path) -> None:
    """Colours that stand for objects, or a cut-out, would be taken for something else.

    What JPEG does to grey is let pass: colours a few levels from it.
    """
    bands = picture.convert("RGBA") if picture.mode not in ("1", "L", "I", "I;16", "F") else None
    if bands is None:
        return
    values = np.asarray(bands).astype(np.int16)
    colours = values[..., :3].max(axis=2) - values[..., :3].min(axis=2)
    found = "colours" if int(colours.max()) > _GREY_LEVELS else ""
    if int(values[..., 3].min()) < 255:
        found = "transparency"
    if found:
        raise DataError(
            f"mask {str(path)!r} has {found}; expected grey of 0 and 255, 0 and 1, or a palette: "
            "save it as grey, with 255 for the object"
        )


def read_voc(path: Path) -> ObjectMask:
    """A mask of VOC12: an index for each class or object, 0 the background, 255 void.

    Raises:
        DataError: a file that cannot be read, or holds no indices; names it.
    """
    picture = _open(path)
    if picture.mode not in ("P", "L"):
        raise DataError(
            f"mask {str(path)!r} is {picture.mode}; expected a palette, or grey values that are "
            "classes"
        )
    values = np.asarray(picture)
    counted = values != VOID
    return ObjectMask((values != 0) & counted, counted)


def _open(path: Path) -> Image.Image:
    """A decoded picture in the mode that its file has."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # odd metadata
            picture = Image.open(io.BytesIO(path.read_bytes()), formats=FORMATS)
            picture.load()
    except Exception as error:
        # A decoder may raise anything on bytes that are wrong: Pillow promises no kinds of errors.
        raise DataError(f"mask {str(path)!r} cannot be read: {error}") from error
    return picture


def _folder(folder: Path) -> FolderPictures:
    if not folder.is_dir():
        raise DataError(f"{str(folder)!r} is no folder")
    found = FolderPictures(folder)
    if not found.names:
        raise DataError(f"folder {str(folder)!r} holds no picture")
    return found


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()
