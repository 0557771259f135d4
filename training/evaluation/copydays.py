"""INRIA Copydays in its published layout: `original/`, `strong/`, `crops/N/` and `jpeg/N/`."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import torch

from training.evaluation.copy_search import STRANGER, CopyBenchmark
from training.sources import DataError, FolderPictures, JoinedPictures, Pictures, open_pictures

_STEPS = ("crops", "jpeg", "jpegqual")  # the archive says jpeg, the original's code jpegqual
_LAYOUT = (
    "expected Copydays' layout: original/NNNN00.jpg and strong/NNNNCC.jpg, "
    "and perhaps crops/PERCENT/ and jpeg/QUALITY/"
)


def open_copydays(folder: Path, distractors: Sequence[str] = ()) -> CopyBenchmark:
    """Opens Copydays, with pictures to hide its originals among.

    A copy belongs to the originals whose names begin with the same four characters. (The original
    code pairs all but `strong` by their order in the folder, which comes to the same.)

    Raises:
        DataError: a folder of another layout, or a copy without an original; names them.
    """
    originals = _pictures(folder / "original")
    numbers: dict[str, int] = {}
    groups = [numbers.setdefault(_key(name), len(numbers)) for name in originals.names]
    parts: list[Pictures] = []
    query_groups: list[int] = []
    blocks: dict[str, range] = {}
    for name in _block_names(folder):
        copies = _pictures(folder / name)
        for copy in copies.names:
            if _key(copy) not in numbers:
                raise DataError(
                    f"{name}/{copy} in {str(folder)!r} has no original: no name in original/ "
                    f"begins with {_key(copy)!r}; {_LAYOUT}"
                )
        blocks[name] = range(len(query_groups), len(query_groups) + len(copies.names))
        query_groups += [numbers[_key(copy)] for copy in copies.names]
        parts.append(copies)
    if not parts:
        raise DataError(f"{str(folder)!r} holds no copies; {_LAYOUT}")
    hidden: list[Pictures] = [originals, *([open_pictures(distractors)] if distractors else [])]
    database = JoinedPictures(hidden)
    strangers = [STRANGER] * (len(database.names) - len(groups))
    return CopyBenchmark(
        queries=JoinedPictures(parts),
        query_groups=torch.tensor(query_groups),
        blocks=blocks,
        database=database,
        database_groups=torch.tensor(groups + strangers),
    )


def _block_names(folder: Path) -> list[str]:
    found = ["strong"] if (folder / "strong").is_dir() else []
    for kind in _STEPS:
        if not (folder / kind).is_dir():
            continue
        steps = [path.name for path in (folder / kind).iterdir() if path.is_dir()]
        if odd := [step for step in steps if not (step.isascii() and step.isdigit())]:
            raise DataError(
                f"{str(folder / kind)!r} holds {odd[0]!r}, which is no number; {_LAYOUT}"
            )
        found += [f"{kind}/{step}" for step in sorted(steps, key=int)]
    return found


def _pictures(folder: Path) -> FolderPictures:
    if not folder.is_dir():
        raise DataError(f"{str(folder)!r} is not there; {_LAYOUT}")
    pictures = FolderPictures(folder)
    if not pictures.names:
        raise DataError(f"{str(folder)!r} holds no picture; {_LAYOUT}")
    return pictures


def _key(name: str) -> str:
    return PurePosixPath(name).name[:4]
