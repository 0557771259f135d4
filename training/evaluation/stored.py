"""Features on disk: plain .npy files that any program can map, and what they were made from.

A folder holds, for each part (`train`, `val`), `PART.json`, and for each descriptor
`PART.DESCRIPTOR.npy`, float32 [N, D], not normalised, in the order of the pictures; and
`PART.labels.npy`, int64 [N], numbers in the JSON's `classes`. The JSON is written last: where it
is, the rest is whole.
"""

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from backbone.pretrained import NamedModel
from training.config import ConfigError
from training.distributed import World, barrier
from training.evaluation.command import describe_data, describe_model
from training.evaluation.features import Batch, share
from training.evaluation.labelled import Labelled
from training.sources import DataError

FORMAT_VERSION = 1
_ROWS = 4096  # that are read at once
_DECIDES = ("fingerprint", "precision", "pictures", "names_sha256")


def description(model: NamedModel, precision: str, data: Labelled) -> dict[str, Any]:
    """What features depend on: the model, the arithmetic, and the pictures by their names.

    Args:
        precision: as `training.precision.precision_name` calls it, so not "auto".
    """
    of_data = describe_data((), data.pictures)
    return {
        "format_version": FORMAT_VERSION,
        **describe_model(model),
        "precision": precision,
        "pictures": of_data["pictures"],
        "names_sha256": of_data["names_sha256"],
        "classes": data.classes,
    }


def storing(
    batches: Iterable[Batch],
    folder: Path,
    part: str,
    *,
    labels: torch.Tensor,
    described: Mapping[str, Any],
    here: World,
) -> Iterator[Batch]:
    """Hands batches on, and writes them as they pass; each process its own rows of shared files.

    Every process must draw all of its batches. What was stored there before gives way.

    Raises:
        ConfigError: a file cannot be written.
    """
    lengths: dict[str, int] = {}
    for places, found in batches:
        with _writing_to(folder):
            if not lengths:
                lengths = {name: vectors.shape[1] for name, vectors in found.items()}
                if here.is_main:
                    _create(folder, part, len(labels), lengths)
                barrier()
            for name, vectors in found.items():
                if len(places):
                    _write_rows(_file(folder, part, name), len(labels), int(places[0]), vectors)
        yield places, found
    barrier()
    if here.is_main:
        with _writing_to(folder):
            np.save(_file(folder, part, "labels"), labels.numpy(), allow_pickle=False)
            text = json.dumps({**described, "descriptors": lengths}, indent=1)
            (folder / f"{part}.json").write_text(text + "\n", encoding="utf-8")


def stored(
    folder: Path,
    part: str,
    descriptors: Sequence[str],
    *,
    described: Mapping[str, Any],
    here: World,
) -> Iterator[Batch]:
    """This process's share of stored features, as `features.stream` gives them, on the CPU.

    They are read in chunks; a process whose share is empty gives one batch of no rows.

    Raises:
        DataError: nothing whole is stored there, or features of another model, precision, of other
            pictures or descriptors; says what was found and what was expected.
    """
    path = folder / f"{part}.json"
    found = _read_description(path)
    for field in _DECIDES:
        if found.get(field) != described[field]:
            raise DataError(
                f"--load-features: {str(path)!r} tells of features with {field} "
                f"{found.get(field)!r}; this model and data have {described[field]!r}"
            )
    lengths = found.get("descriptors")
    lengths = lengths if isinstance(lengths, dict) else {}
    if absent := [name for name in descriptors if name not in lengths]:
        raise DataError(
            f"--load-features: {str(path)!r} tells of the descriptors {', '.join(lengths)}; "
            f"--descriptors asks for {absent[0]!r}"
        )
    count = int(described["pictures"])
    maps = {name: _map(_file(folder, part, name), (count, lengths[name])) for name in descriptors}
    return _chunks(maps, share(count, here), title=f"{part}, stored", here=here)


def _chunks(
    maps: Mapping[str, NDArray[np.float32]],
    places: range,
    *,
    title: str,
    here: World,
) -> Iterator[Batch]:
    with tqdm(
        total=len(places), unit="picture", desc=title, dynamic_ncols=True, disable=not here.is_main
    ) as bar:
        for start in range(places.start, max(places.stop, places.start + 1), _ROWS):
            rows = range(start, min(start + _ROWS, places.stop))
            chunk = {
                name: torch.from_numpy(np.array(values[rows.start : rows.stop]))
                for name, values in maps.items()
            }
            yield torch.arange(rows.start, rows.stop), chunk
            bar.update(len(rows))


@contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"--save-features {folder}: {error}") from error


def _file(folder: Path, part: str, name: str) -> Path:
    return folder / f"{part}.{name}.npy"


def _create(folder: Path, part: str, count: int, lengths: Mapping[str, int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{part}.json").unlink(missing_ok=True)
    for name, length in lengths.items():
        with _file(folder, part, name).open("wb") as file:
            file.write(_header(count, length))


def _write_rows(path: Path, count: int, start: int, vectors: torch.Tensor) -> None:
    # Written, not mapped: on a full disk, mapped memory ends the process without a word.
    header, length = _header(count, vectors.shape[1]), vectors.shape[1]
    with path.open("r+b") as file:
        file.seek(len(header) + 4 * length * start)
        file.write(vectors.float().cpu().contiguous().numpy().astype("<f4", copy=False).data)


def _header(count: int, length: int) -> bytes:
    file = io.BytesIO()
    described = {"descr": "<f4", "fortran_order": False, "shape": (count, length)}
    np.lib.format.write_array_header_1_0(file, described)
    return file.getvalue()


def _read_description(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"--load-features: {str(path)!r} does not exist; expected a folder that "
            "--save-features wrote to its end"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"--load-features: {str(path)!r} cannot be read: {error}") from error
    version = found.get("format_version") if isinstance(found, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"--load-features: {str(path)!r} has format version {version!r}; this program reads "
            f"{FORMAT_VERSION}"
        )
    return dict(found)


def _map(path: Path, shape: tuple[int, int]) -> NDArray[np.float32]:
    try:
        values: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"--load-features: {str(path)!r} cannot be read: {error}") from error
    if values.dtype != np.dtype("<f4") or values.shape != shape:
        raise DataError(
            f"--load-features: {str(path)!r} holds {values.dtype} {list(values.shape)}, not "
            f"float32 {list(shape)}"
        )
    return values
