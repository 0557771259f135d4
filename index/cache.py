"""One space's search structure on disk: valid, or found out and built anew.

In the collection's folder:

    index/<space>.<generation>.ann     what `Ann.save` wrote
    index/<space>.<generation>.rows    int64 [n], as .npy: the row number at each position
    index/<space>.json                 the manifest, which names the generation that counts

The two files of a new generation are on disk before the manifest names them, and the older ones go
after that, so at every instant the manifest names whole files. What a crash left is cleared by the
next `write_cache`.
"""

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index.durable import (
    ManifestDamaged,
    fsync,
    read_manifest,
    refusals_named,
    sha256_of,
    write_manifest,
)

_FOLDER = "index"
_FORMAT = 1
_FILES = ("ann", "rows")


class CacheUnusable(Exception):
    """The cache must not be used; `reason` says why, for the log. `remove_caches` clears it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, eq=False)
class CachedIndex:
    """A structure on disk, its checksums verified.

    Attributes:
        path: the file for `Ann.load`. It may stay mapped when a later generation takes its place.
        numbers: int64 [n], the row number at each position.
        generation, effort, recall, kind, described: as given to `write_cache`.
    """

    path: Path
    numbers: NDArray[np.int64]
    generation: int
    effort: int
    recall: float | None
    kind: str
    described: dict[str, Any]


def write_cache(
    folder: Path,
    space: str,
    *,
    save: Callable[[Path], None],
    numbers: NDArray[np.int64],
    kind: str,
    effort: int,
    recall: float | None = None,
    described: Mapping[str, Any],
    generation: int,
) -> int:
    """Put a structure on disk in the place of the older one; how many bytes it takes there.

    One thread at a time may write a space's cache. Needs room for both generations.

    Args:
        folder: the collection's, which must exist.
        save: writes the structure to the path it is given and raises when it cannot.
        numbers: int64 [n], the row number at each position.
        recall: as measured at this effort; None: it was not.
        described: JSON values that must be equal for the structure to be of use when it is read:
            the collection's own identity, metric, dimension, model, version of the library.
        generation: greater than every one tried before; a number that was left out does no harm.

    Raises:
        StoreFailed: the operating system refused (disk full, I/O error). The older one stays.
        ValueError: `generation` is not greater than the one on disk, or `numbers` is not [n].
    """
    numbers = np.asarray(numbers, dtype=np.int64)
    if numbers.ndim != 1:
        raise ValueError(f"numbers must have one dimension, not the shape {numbers.shape}")
    described = _as_json(described)
    where = folder / _FOLDER
    with refusals_named(f"the index of space {space!r} could not be written to disk"):
        if not where.is_dir():
            where.mkdir()
            fsync(folder)
        held = _held_generation(where, space)
        if held is not None and generation <= held:
            raise ValueError(f"generation must be greater than {held}, not {generation}")
        kept = _names(space, held)
        _clear(where, space, keep=kept)  # first: what a crash left may be what fills the disk
        try:
            manifest = {
                "format": _FORMAT,
                "space": space,
                "generation": generation,
                "kind": kind,
                "effort": effort,
                "recall": recall,
                "described": described,
                "count": len(numbers),
                "files": _write_files(where, space, generation, save, numbers),
            }
            write_manifest(_manifest_path(where, space), manifest)
        except BaseException:
            # Of the last step nobody knows whether it took place: then both generations stay.
            _clear(where, space, keep=kept | _names(space, _held_generation(where, space)))
            raise
        new = _names(space, generation)
        _clear(where, space, keep=new)
        return sum((where / name).stat().st_size for name in new)


def note_effort(
    folder: Path, space: str, *, generation: int, kind: str, effort: int, recall: float
) -> None:
    """Put another effort and recall beside a structure on disk, if it is of this generation.

    Raises:
        StoreFailed: the operating system refused; what was noted before stays.
    """
    path = _manifest_path(folder / _FOLDER, space)
    try:
        manifest = read_manifest(path, version=_FORMAT)
    except (FileNotFoundError, ManifestDamaged):
        return  # the next start finds out and builds it anew
    if (manifest["generation"], manifest["kind"]) == (generation, kind):
        with refusals_named(f"the effort of space {space!r} could not be written to disk"):
            write_manifest(path, manifest | {"effort": effort, "recall": recall})


def read_cache(folder: Path, space: str, *, described: Mapping[str, Any]) -> CachedIndex | None:
    """The structure on disk, after reading every byte of it once; None where there is none.

    Raises:
        CacheUnusable: damaged, of another version, or written for something other than `described`.
    """
    where = folder / _FOLDER
    try:
        manifest = read_manifest(_manifest_path(where, space), version=_FORMAT)
    except FileNotFoundError:
        return None
    except ManifestDamaged as error:
        raise CacheUnusable(f"its manifest {error.reason}") from error
    if manifest["space"] != space:
        raise CacheUnusable(f"its manifest is that of space {manifest['space']!r}")
    _check_described(manifest["described"], _as_json(described))
    ann, rows = (_path(where, space, manifest["generation"], file) for file in _FILES)
    _check_file(ann, manifest["files"]["ann"])
    _check_file(rows, manifest["files"]["rows"])
    return CachedIndex(
        path=ann,
        numbers=np.load(rows, allow_pickle=False),
        generation=manifest["generation"],
        effort=manifest["effort"],
        recall=manifest.get("recall"),
        kind=manifest["kind"],
        described=manifest["described"],
    )


def remove_caches(folder: Path, space: str | None = None) -> None:
    """Remove the cache of one space, or of all, and whatever a crash left of it.

    Raises:
        StoreFailed: the operating system refused.
    """
    where = folder / _FOLDER
    if where.is_dir():
        with refusals_named("the index on disk could not be removed"):
            _clear(where, space, keep=set())
            fsync(where)


def cache_bytes(folder: Path) -> int:
    """How many bytes the caches of all spaces take on disk, unfinished ones included."""
    total = 0
    try:
        paths = list((folder / _FOLDER).iterdir())
    except FileNotFoundError:
        return 0  # nothing was saved yet, or the collection was deleted meanwhile
    for path in paths:
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue  # renamed or removed meanwhile by `write_cache`
    return total


def _write_files(
    where: Path,
    space: str,
    generation: int,
    save: Callable[[Path], None],
    numbers: NDArray[np.int64],
) -> dict[str, dict[str, Any]]:
    """The two files, under their names and on disk; the size and checksum of each."""

    def save_numbers(path: Path) -> None:
        # Not straight into the file: NumPy would use C's own buffer, whose last part may be lost
        # without an error when the disk is full.
        content = io.BytesIO()
        np.save(content, numbers, allow_pickle=False)
        path.write_bytes(content.getbuffer())

    written = {}
    for file, write in zip(_FILES, (save, save_numbers), strict=True):
        path = _path(where, space, generation, file)
        unfinished = path.with_name(f"{path.name}.new")
        write(unfinished)
        fsync(unfinished)
        written[file] = {"bytes": unfinished.stat().st_size, "sha256": sha256_of(unfinished)}
        unfinished.rename(path)
    fsync(where)
    return written


def _check_described(held: dict[str, Any], expected: dict[str, Any]) -> None:
    for field in sorted(held.keys() | expected.keys()):
        was, now = (json.dumps(each.get(field), sort_keys=True) for each in (held, expected))
        if was != now:
            raise CacheUnusable(f"it was built with {field} {was}, and {field} is {now}")


def _check_file(path: Path, written: Mapping[str, Any]) -> None:
    try:
        size = path.stat().st_size
        if size != written["bytes"]:
            raise CacheUnusable(f"{path.name} has {size} bytes, not {written['bytes']}")
        if sha256_of(path) != written["sha256"]:
            raise CacheUnusable(f"{path.name} is damaged: its checksum differs")
    except FileNotFoundError as error:
        raise CacheUnusable(f"{path.name} is missing") from error
    except OSError as error:
        raise CacheUnusable(f"{path.name} cannot be read: {error.strerror or error}") from error


def _held_generation(where: Path, space: str) -> int | None:
    """The generation that counts; None without a manifest that can be read."""
    try:
        manifest = read_manifest(_manifest_path(where, space), version=_FORMAT)
    except (FileNotFoundError, ManifestDamaged):
        return None
    generation: int = manifest["generation"]
    return generation


def _clear(where: Path, space: str | None, *, keep: set[str]) -> None:
    for path in where.iterdir():
        # No space's name has a dot in it, so this prefix is of one space alone.
        is_of_space = space is None or path.name.startswith(f"{space}.")
        if is_of_space and path.name not in keep:
            path.unlink()


def _names(space: str, generation: int | None) -> set[str]:
    if generation is None:
        return set()
    return {f"{space}.json", *(f"{space}.{generation}.{file}" for file in _FILES)}


def _path(where: Path, space: str, generation: int, file: str) -> Path:
    return where / f"{space}.{generation}.{file}"


def _manifest_path(where: Path, space: str) -> Path:
    return where / f"{space}.json"


def _as_json(described: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from a file: tuples become lists, keys strings."""
    as_json: dict[str, Any] = json.loads(json.dumps(dict(described), allow_nan=False))
    return as_json
