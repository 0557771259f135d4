"""Revisited Oxford and Paris in their published layout (arXiv 1803.11285)."""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from training.decoding import decode
from training.evaluation.plain_pickle import PlainArray, read_plain_pickle
from training.evaluation.ranking import Relevant
from training.sources import DataError, Pictures

DATASETS = ("roxford5k", "rparis6k")
DIFFICULTIES = ("easy", "medium", "hard")

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""

_NAME = re.compile(r"[^/\\\0]+")


class Query(NamedTuple):
    """One query: its box, and places of database pictures by how hard they are to find."""

    box: Box
    easy: list[int]
    hard: list[int]
    junk: list[int]

    def relevant(self, difficulty: str) -> Relevant:
        """The ground truth of "easy", "medium" or "hard".

        Medium wants the easy ones and the hard ones; the other two pass over what they do not want.
        """
        if difficulty == "medium":
            return Relevant(self.easy + self.hard, self.junk)
        if difficulty == "easy":
            return Relevant(self.easy, self.junk + self.hard)
        if difficulty == "hard":
            return Relevant(self.hard, self.junk + self.easy)
        raise ValueError(f"difficulty {difficulty!r} is none of {', '.join(DIFFICULTIES)}")


class Landmarks(NamedTuple):
    """A data set: its name, the pictures to search, the pictures to search with, ground truth."""

    name: str
    database: Pictures
    queries: Pictures
    truth: Sequence[Query]

    def cropped_queries(self) -> Pictures:
        """The queries, cut to their boxes."""
        return _Boxed(self.queries, [query.box for query in self.truth])


def open_landmarks(folder: Path, dataset: str | None = None) -> list[Landmarks]:
    """Opens the data sets below `folder`, or `folder` itself where it is one.

    Expected are `DATASET/gnd_DATASET.pkl` and `DATASET/jpg/NAME.jpg`. The pickle is read without
    running anything in it.

    Args:
        dataset: one of `DATASETS`; None takes those that are there.

    Raises:
        DataError: nothing of that layout, a pickle that holds something else, or missing pictures.
    """
    found = []
    for name in (dataset,) if dataset else DATASETS:
        for place in (folder / name, folder):
            if (place / f"gnd_{name}.pkl").is_file():
                found.append(_open(place, name))
                break
    if not found:
        wanted = " or ".join(f"{n}/gnd_{n}.pkl" for n in ((dataset,) if dataset else DATASETS))
        raise DataError(
            f"--data {str(folder)!r} holds neither {wanted} nor that file itself; "
            "expected the published layout: DATASET/gnd_DATASET.pkl and DATASET/jpg/NAME.jpg"
        )
    return found


class _Named:
    """The files of a folder that a list names."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._folder, self.names = folder, names

    def read(self, i: int) -> bytes:
        return (self._folder / self.names[i]).read_bytes()


class _Boxed:
    """Pictures cut to boxes, written anew without loss."""

    def __init__(self, whole: Pictures, boxes: Sequence[Box]) -> None:
        self._whole, self._boxes, self.names = whole, boxes, whole.names

    def read(self, i: int) -> bytes:
        name = self.names[i]
        picture = decode(self._whole.read(i), name)
        left, top, right, bottom = map(round, self._boxes[i])
        inside = max(0, left), max(0, top), min(picture.width, right), min(picture.height, bottom)
        if inside[0] >= inside[2] or inside[1] >= inside[3]:
            raise DataError(
                f"the box {list(self._boxes[i])} of query {name!r} lies outside of its picture of "
                f"{picture.width} x {picture.height}; expected left, top, right, bottom in pixels"
            )
        file = io.BytesIO()
        picture.crop(inside).save(file, "PPM")
        return file.getvalue()


def _open(folder: Path, name: str) -> Landmarks:
    path = folder / f"gnd_{name}.pkl"
    try:
        found = _fields(
            read_plain_pickle(path.read_bytes()), ("imlist", "qimlist", "gnd"), "the pickle"
        )
        database, queries = (_names(found[field], field) for field in ("imlist", "qimlist"))
        gnd = _list(found["gnd"], "gnd")
        if len(gnd) != len(queries):
            raise ValueError(f"gnd has {len(gnd)} queries and qimlist {len(queries)}")
        truth = [_query(each, f"gnd[{i}]", len(database)) for i, each in enumerate(gnd)]
    except ValueError as error:
        raise DataError(f"{str(path)!r}: {error}") from error
    jpg = folder / "jpg"
    if missing := [n for n in (*queries, *database) if not (jpg / n).is_file()]:
        raise DataError(
            f"{str(jpg)!r} lacks {len(missing)} pictures that {path.name} names, "
            f"e.g. {missing[0]!r}"
        )
    return Landmarks(name, _Named(jpg, database), _Named(jpg, queries), truth)


def _names(value: Any, field: str) -> list[str]:
    names = _list(value, field)
    for name in names:
        # A name with a folder in it would lead out of jpg/.
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"{field} holds {name!r}, not a file's name without its .jpg")
    if not names:
        raise ValueError(f"{field} is empty")
    return [f"{name}.jpg" for name in names]


def _query(value: Any, where: str, pictures: int) -> Query:
    found = _fields(value, ("bbx", "easy", "hard", "junk"), where)
    box = _list(found["bbx"], f"{where}.bbx")
    if len(box) != 4 or not all(_is_number(edge) for edge in box):
        raise ValueError(f"{where}.bbx is {box}, not left, top, right, bottom in pixels")
    left, top, right, bottom = map(float, box)
    easy, hard, junk = (
        _places(found[field], f"{where}.{field}", pictures) for field in ("easy", "hard", "junk")
    )
    return Query((left, top, right, bottom), easy, hard, junk)


def _places(value: Any, where: str, pictures: int) -> list[int]:
    places = _list(value, where)
    for place in places:
        if not _is_number(place) or place != int(place) or not 0 <= place < pictures:
            raise ValueError(
                f"{where} holds {place!r}, not the place of one of imlist's {pictures} pictures"
            )
    return [int(place) for place in places]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**53


def _list(value: Any, where: str) -> list[Any]:
    if isinstance(value, PlainArray):
        value = value.values.reshape(-1).tolist()
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where} is a {type(value).__name__}, not a list")
    return list(value)


def _fields(value: Any, fields: Sequence[str], where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds a {type(value).__name__}, not a dict of {list(fields)}")
    if missing := [field for field in fields if field not in value]:
        raise ValueError(f"{where} lacks {missing}; it has {sorted(map(str, value))}")
    return value
