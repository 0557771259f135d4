"""CSV files of a run, a row for some of its steps, that go on where a resumed run does."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path


class RowFile:
    """Writes rows as they come, each on disk before the next.

    A resumed run will write again what came after its snapshot: those rows are dropped when the
    file opens, and older ones get the columns that they lack, empty.

    Args:
        columns: the names in the file's first line; "step" must be among them.
        start: the steps done; rows up to it are kept.

    Attributes:
        kept: the rows of before.
    """

    def __init__(self, path: Path, columns: Sequence[str], *, start: int) -> None:
        old = read_rows(path)
        self.kept = [row for row in old if int(row["step"]) <= start]
        if len(self.kept) < len(old) or _header(path) != list(columns):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".partial")
            with temporary.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, columns, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(self.kept)
            temporary.replace(path)
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, columns, extrasaction="ignore")

    def write(self, row: Mapping[str, float | str]) -> None:
        """Adds a row; numbers get six digits, columns without a value stay empty."""
        self._writer.writerow(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
        )
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a file, none where it does not exist.

    A row that was cut off when the machine went down is left out.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


def _header(path: Path) -> list[str]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return next(csv.reader(file), [])
