"""Pictures that cannot be read: counted, listed in the run's folder, and too many of them."""

import csv
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Protocol

from training.distributed import World
from training.picture_files import DataError

WINDOW = 100


class Batch(Protocol):
    """What is looked at of a batch; `training.samples.CropBatch` has it."""

    @property
    def names(self) -> Sequence[str]:
        """Of the pictures in it."""

    @property
    def bad(self) -> Sequence[Sequence[str]]:
        """Name and reason of those that could not be read."""


class BadPictures:
    """Keeps the list of one process: `run_dir/bad_pictures.rank0.csv`, for rank 0.

    Each name stands in it once, however often it is met, and in a resumed run too. The file is made
    when there is something to list.

    Attributes:
        path: of the list.
    """

    def __init__(self, run_dir: Path, world: World) -> None:
        self.path = run_dir / f"bad_pictures.rank{world.rank}.csv"
        self._listed = _listed(self.path)
        self._latest: deque[tuple[int, int]] = deque()
        self._looked_at = self._bad = 0

    @property
    def count(self) -> int:
        """Pictures known to be bad, those of the run's earlier parts included."""
        return len(self._listed)

    def saw(self, batch: Batch) -> None:
        """Takes note of a batch's bad pictures.

        Raises:
            DataError: at least half of the latest pictures, 100 or a batch more, are bad.
        """
        self._list([(name, " ".join(reason.split())) for name, reason in batch.bad])
        latest = len(batch.names) + len(batch.bad), len(batch.bad)
        self._latest.append(latest)
        self._looked_at += latest[0]
        self._bad += latest[1]
        while self._looked_at - self._latest[0][0] >= WINDOW:
            looked_at, bad = self._latest.popleft()
            self._looked_at -= looked_at
            self._bad -= bad
        if self._looked_at >= WINDOW and 2 * self._bad >= self._looked_at:
            some = ", ".join(list(self._listed)[-3:])
            raise DataError(
                f"{self._bad} of the latest {self._looked_at} pictures cannot be read, among them "
                f"{some}; {str(self.path)!r} tells why. A run stops when half are bad: "
                "mend data.train and start again"
            )

    def _list(self, bad: Sequence[tuple[str, str]]) -> None:
        new = {name: reason for name, reason in bad if name not in self._listed}
        if not new:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _open(self.path, "a") as file:
            writer = csv.writer(file, lineterminator="\n")
            if file.tell() == 0:
                writer.writerow(("name", "reason"))
            writer.writerows(new.items())
        self._listed.update(dict.fromkeys(new))


def _listed(path: Path) -> dict[str, None]:
    """The names in the file, in order; a row that a killed run left unfinished is cut off."""
    if not path.exists():
        return {}
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        path.write_bytes(whole)
    with _open(path, "r") as file:
        return dict.fromkeys(row["name"] for row in csv.DictReader(file))


def _open(path: Path, mode: str) -> IO[str]:
    # The names of files may be any bytes.
    return path.open(mode, newline="", encoding="utf-8", errors="surrogateescape")
