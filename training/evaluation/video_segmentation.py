"""Video object segmentation on DAVIS 2017 by label propagation (paper, section 4.2.2, Table 5)."""

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import chain, groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from backbone.artifact import ArtifactError
from backbone.preprocess import Preprocess
from backbone.vit import VisionTransformer
from training.config import ConfigError
from training.decoding import decode
from training.distributed import World, gather_rows
from training.evaluation.command import Session, add_common_options, positive, session, tell, whole
from training.evaluation.davis import (
    ANNOTATIONS,
    VideoSequence,
    count_objects,
    open_davis,
    read_mask,
    write_mask,
)
from training.evaluation.features import share
from training.evaluation.label_propagation import Propagation, to_labels, to_mask, track
from training.evaluation.outputs import check_folder
from training.evaluation.segmentation_measures import (
    Statistics,
    boundary_f,
    jaccard,
    statistics,
)
from training.precision import autocast, autocast_dtype
from training.sources import DataError
from training.workers import worker_settings

_MULTIPLE = 64  # pixels, of the long side


class ObjectMeasures(NamedTuple):
    """J and F of one object of a sequence, as shares of 1."""

    jaccard: Statistics
    boundary_f: Statistics


def view_size(width: int, height: int, *, short_side: int, patch_size: int) -> tuple[int, int]:
    """The width and height at which the network sees a frame, as in the original.

    The short side is `short_side`, the long one in proportion, rounded down to a multiple of 64:
    854 x 480 becomes 832 x 480. A quirk that is kept: so does that of a square, 448 x 480. Patches
    that do not divide these round both down further; where 64 is too much, both sides are the same.

    Raises:
        ConfigError: `short_side` holds no patch.
    """
    short = short_side // patch_size * patch_size
    if short == 0:
        raise ConfigError(f"--size {short_side} holds no patch of {patch_size} pixels")
    long = int(short_side * max(width, height) / min(width, height))
    long = long // _MULTIPLE * _MULTIPLE // patch_size * patch_size
    long = long or short
    return (short, long) if height > width else (long, short)


def view(picture: Image.Image, preprocess: Preprocess, size: tuple[int, int]) -> Tensor:
    """A frame as the network sees it, normalised [C, H, W], of `size` (width, height).

    Bilinear between the four nearest pixels and rounded to 8 bits, without antialiasing, as the
    original's image library does it.
    """
    pixels = torch.from_numpy(np.array(picture.convert(preprocess.mode), dtype=np.float32))
    pixels = pixels.reshape(picture.height, picture.width, -1).permute(2, 0, 1)
    pixels = F.interpolate(
        pixels[None], size=(size[1], size[0]), mode="bilinear", align_corners=False
    )[0].round()
    mean, std = (
        torch.tensor(of)[:, None, None] * 255.0 for of in (preprocess.mean, preprocess.std)
    )
    return (pixels - mean) / std


def segment(
    sequences: Sequence[VideoSequence],
    out: Path,
    own: Session,
    settings: Propagation,
    *,
    short_side: int = 480,
) -> None:
    """Follows each sequence's objects from its first mask on, and writes a mask for every frame.

    Masks are OUT/SEQUENCE/00000.png, of the frames' size, in the official palette; the first is the
    one that was given. Each process follows its share of the sequences.

    Raises:
        ArtifactError: the network has no patch tokens.
        ConfigError: `short_side` holds no patch.
        DataError: a frame or a first mask that cannot be read; it is named.
    """
    artifact, here = own.artifact, own.here
    network = artifact.network().to(here.device)
    if not isinstance(network, VisionTransformer):
        raise ArtifactError(
            f"--model {own.model.name} is a {artifact.architecture.name}, which has no patch "
            "tokens; labels are passed on between those of a Vision Transformer"
        )
    dtype = autocast_dtype(own.precision, here.device)
    patch = network.patch_size

    def embed(frames: Tensor) -> Tensor:
        with autocast(here.device, dtype):
            found = network(frames.to(here.device))
        tokens = F.normalize(found.patches.float(), dim=2)
        return tokens.reshape(len(tokens), *found.grid, -1)

    mine = [sequences[i] for i in share(len(sequences), here)]
    views = _Views(mine, artifact.preprocess, short_side, patch, own.batch_size)
    loader = DataLoader(views, batch_size=None, **worker_settings(own.workers))
    total = sum(len(sequence.frames) for sequence in mine)
    with torch.inference_mode(), _bar(total, "propagation", here) as bar:
        for place, batches in groupby(loader, key=lambda batch: batch[0]):
            sequence, grid = mine[place], views.grid(place)
            objects = count_objects(sequence)
            mask = read_mask(sequence.annotations[0], size=sequence.size)
            folder = out / sequence.name
            folder.mkdir(parents=True, exist_ok=True)
            write_mask(folder / sequence.annotations[0].name, mask)
            bar.update()
            first = to_labels(mask, objects=objects, grid=grid).to(here.device)
            frames = chain.from_iterable(embed(batch) for _, batch in batches)
            for path, labels in zip(
                sequence.annotations[1:], track(frames, first, settings), strict=True
            ):
                mask = to_mask(labels, patch_size=patch, size=sequence.size)
                write_mask(folder / path.name, mask)
                bar.update()


def measure(sequence: VideoSequence, folder: Path) -> list[ObjectMeasures]:
    """J and F of every object of a sequence, of the masks in `folder`, frame by frame.

    The first frame was given, and the last is left out as well, as officially.

    Raises:
        DataError: a mask that is missing, broken, of another size than its frame, or with a number
            above the count of objects; it is named.
    """
    objects = count_objects(sequence)
    values: list[tuple[list[float], list[float]]] = [([], []) for _ in range(objects)]
    for annotation in sequence.annotations[1:-1]:
        path = folder / annotation.name
        found = read_mask(path, size=sequence.size)
        if found.max() > objects:
            raise DataError(
                f"mask {str(path)!r} has object {found.max()}; {sequence.name} has {objects}"
            )
        truth = read_mask(annotation, size=sequence.size)
        for number, (js, fs) in enumerate(values, 1):
            js.append(jaccard(found == number, truth == number))
            fs.append(boundary_f(found == number, truth == number))
    return [ObjectMeasures(statistics(js), statistics(fs)) for js, fs in values]


def measure_all(
    sequences: Sequence[VideoSequence], folder: Path, *, here: World
) -> dict[str, list[ObjectMeasures]]:
    """Every sequence's measures by its name, on every process.

    Each process measures its share, the same sequences that it follows in `segment`.

    Raises:
        DataError: see `measure`.
    """
    rows: list[list[float]] = []
    mine = share(len(sequences), here)
    with _bar(len(mine), "measures", here) as bar:
        for place in mine:
            for each in measure(sequences[place], folder / sequences[place].name):
                rows.append([place, *each.jaccard, *each.boundary_f])
            bar.update()
    gathered = gather_rows(torch.tensor(rows, dtype=torch.float64).reshape(-1, 7), here)
    found: dict[str, list[ObjectMeasures]] = {sequence.name: [] for sequence in sequences}
    for place, *values in gathered.tolist():
        measures = ObjectMeasures(Statistics(*values[:3]), Statistics(*values[3:]))
        found[sequences[int(place)].name].append(measures)
    return found


def percentages(measures: Sequence[ObjectMeasures]) -> dict[str, float]:
    """J, F and their mean over objects, in percent."""
    found = {
        f"{name}_{field}": 100.0
        * sum(getattr(getattr(each, measure), field) for each in measures)
        / len(measures)
        for name, measure in (("j", "jaccard"), ("f", "boundary_f"))
        for field in Statistics._fields
    }
    return {"j_and_f_mean": (found["j_mean"] + found["f_mean"]) / 2, **found}


def add_command(names: Any) -> None:
    """Adds `video_segmentation` to the command line of `python -m training.evaluation`."""
    parser: argparse.ArgumentParser = names.add_parser(
        "video_segmentation", help=__doc__, description=__doc__
    )
    add_common_options(parser, batch_size=4)
    defaults = Propagation()
    parser.add_argument("--data", required=True, type=Path, help="DAVIS 2017, as published")
    masks = parser.add_mutually_exclusive_group(required=True)
    masks.add_argument("--out", type=Path, metavar="DIR", help="where masks are written")
    masks.add_argument(
        "--only-measure", type=Path, metavar="DIR", help="masks that --model made before"
    )
    parser.add_argument("--size", type=positive, default=480, help="short side of frames, pixels")
    parser.add_argument("--last-frames", type=whole, default=defaults.last_frames)
    parser.add_argument(
        "--radius", type=whole, default=defaults.radius, help="patches; 0: no bound"
    )
    parser.add_argument("--topk", type=positive, default=defaults.topk)
    parser.add_argument("--temperature", type=float, default=defaults.temperature)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    try:
        settings = Propagation(
            last_frames=options.last_frames,
            radius=options.radius,
            topk=options.topk,
            temperature=options.temperature,
        )
    except ValueError as error:
        raise ConfigError(f"--{error}") from error
    with session(options) as own:
        sequences = open_davis(options.data)
        if options.out and options.out.resolve() == (options.data / ANNOTATIONS).resolve():
            raise ConfigError(f"--out {options.out} holds the annotations; give another folder")
        protocol: dict[str, Any] = {"size": options.size, **asdict(settings)}
        folder = options.only_measure
        if folder is None:
            folder = options.out
            check_folder("--out", folder)
            segment(sequences, folder, own, settings, short_side=options.size)
        else:
            protocol = {"masks": str(folder)}
        found = measure_all(sequences, folder, here=own.here)
        every = percentages([each for measures in found.values() for each in measures])
        by_sequence = {
            name: {
                **percentages(measures),
                "objects": {str(i): percentages([each]) for i, each in enumerate(measures, 1)},
            }
            for name, measures in found.items()
        }
        listed = "\n".join(f"{s.name} {path.name}" for s in sequences for path in s.frames)
        tell(
            options,
            own,
            name="video_segmentation",
            figures={"video_segmentation": {**every, "sequences": by_sequence}},
            protocol=protocol,
            data={
                "paths": [str(options.data)],
                "sequences": len(sequences),
                "pictures": sum(len(sequence.frames) for sequence in sequences),
                "names_sha256": hashlib.sha256(listed.encode()).hexdigest(),
            },
            table=_table(found, every, own.model.name),
        )


def _table(
    found: Mapping[str, Sequence[ObjectMeasures]], every: Mapping[str, float], model: str
) -> str:
    rows = [
        (f"{name} {number}", percentages([each]))
        for name, measures in found.items()
        for number, each in enumerate(measures, 1)
    ]
    width = max(len(title) for title, _ in rows)
    heads = ("J&F", "J mean", "recall", "decay", "F mean", "recall", "decay")
    lines = [
        f"label propagation in {len(found)} sequences, {len(rows)} objects, model {model}",
        f"  {'':{width}}" + "".join(f"{head:>8}" for head in heads),
    ]
    for title, values in (*rows, ("mean", every)):
        numbers = "".join(f"{value:8.2f}" for value in values.values())
        lines.append(f"  {title:{width}}{numbers}")
    return "\n".join(lines)


def _bar(total: int, title: str, here: World) -> "tqdm[Any]":
    return tqdm(total=total, desc=title, dynamic_ncols=True, disable=not here.is_main)


class _Views(Dataset[tuple[int, Tensor]]):
    """Batches of frames [B, C, H, W], each of one sequence, whose place comes with it."""

    def __init__(
        self,
        sequences: Sequence[VideoSequence],
        preprocess: Preprocess,
        short_side: int,
        patch_size: int,
        batch_size: int,
    ) -> None:
        self._sequences, self._preprocess, self._patch = sequences, preprocess, patch_size
        self._sizes = [
            view_size(*sequence.size, short_side=short_side, patch_size=patch_size)
            for sequence in sequences
        ]
        self._batches = [
            (place, sequence.frames[at : at + batch_size])
            for place, sequence in enumerate(sequences)
            for at in range(0, len(sequence.frames), batch_size)
        ]

    def grid(self, place: int) -> tuple[int, int]:
        """The number of patches down and across of a sequence's frames."""
        width, height = self._sizes[place]
        return height // self._patch, width // self._patch

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, i: int) -> tuple[int, Tensor]:
        place, paths = self._batches[i]
        frames = [
            view(decode(path.read_bytes(), str(path)), self._preprocess, self._sizes[place])
            for path in paths
        ]
        return place, torch.stack(frames)
