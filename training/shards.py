"""Tar and Parquet files, counted once and then read from front to back."""

import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from training import parquet, tars
from training.distributed import World, all_gather_int
from training.picture_files import DataError


class Shards:
    """Tar and Parquet files, and how many pictures each holds.

    Raises:
        DataError: there is none.
    """

    def __init__(self, paths: Sequence[Path], counts: Sequence[int]) -> None:
        self.paths = paths
        self.counts = counts
        self.count = sum(counts)
        if not self.count:
            raise DataError(f"{', '.join(map(str, paths))}: no picture in any of them")


def count_shards(paths: Sequence[Path], known: Path, world: World) -> Shards:
    """Counts the pictures in each shard, which takes reading over all of them once.

    The processes share the work, and rank 0 shows how far it is. All of them must call this.

    Args:
        known: a JSON file that remembers the counts of files of the same path, size and time of
            change; rank 0 writes it.

    Raises:
        DataError: a shard that cannot be read, or processes that see different shards.
    """
    seen = "\n".join(f"{path.name} {path.stat().st_size}" for path in paths)
    if len(set(all_gather_int(zlib.crc32(os.fsencode(seen)), world.device))) > 1:
        raise DataError(
            "the processes do not see the same shards: "
            "the files of data.train must be the same on every node"
        )
    remembered = _remembered(known)
    signs = [_sign(path) for path in paths]
    counts: list[int] = []
    with tqdm(
        total=len(paths),
        unit="shard",
        desc="counting",
        dynamic_ncols=True,
        disable=not world.is_main,
    ) as bar:
        for first in range(0, len(paths), world.size):
            own = first + world.rank
            count = 0
            if own < len(paths):
                found = remembered.get(signs[own])
                count = _count(paths[own]) if found is None else found
            counts += all_gather_int(count, world.device)[: len(paths) - first]
            bar.update(len(counts) - bar.n)
    if world.is_main:
        _remember(known, dict(zip(signs, counts, strict=True)))
    return Shards(paths, counts)


def read_shard(path: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """The pictures of a shard from front to back: each one's name, and a way to its bytes.

    The way is open until the next picture is asked for.

    Raises:
        DataError: damage, when it is reached.
    """
    return parquet.read_through(path) if _is_parquet(path) else tars.read_through(path)


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == parquet.SUFFIX


def _count(path: Path) -> int:
    return parquet.row_count(path) if _is_parquet(path) else sum(1 for _ in tars.read_through(path))


def _sign(path: Path) -> str:
    about = path.stat()
    return f"{path.resolve()} {about.st_size} {about.st_mtime_ns}"


def _remembered(known: Path) -> dict[str, int]:
    try:
        found = json.loads(known.read_text())
    except (FileNotFoundError, ValueError):
        return {}  # a file that was lost or damaged costs one more pass over the shards
    return found if isinstance(found, dict) else {}


def _remember(known: Path, counts: dict[str, int]) -> None:
    known.parent.mkdir(parents=True, exist_ok=True)
    partial_file = known.with_name(f"{known.name}.{os.getpid()}.partial")
    partial_file.write_text(json.dumps(counts, indent=0) + "\n")
    partial_file.replace(known)
