"""Whether attention finds the object: the Jaccard index of masked CLS attention (paper, fig. 4)."""

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from backbone.architectures import Backbone
from backbone.artifact import Artifact, ArtifactError
from backbone.descriptors import mass_mask
from backbone.pretrained import NamedModel, load_model
from training.config import ConfigError
from training.distributed import World, gather_rows
from training.evaluation.attention_examples import draw_example, sheet
from training.evaluation.command import (
    Session,
    add_common_options,
    check_channels,
    describe_data,
    describe_model,
    positive,
    session,
    tell,
    whole,
)
from training.evaluation.features import share
from training.evaluation.masks import ObjectMask, Pairs, open_pairs, open_voc
from training.precision import autocast, autocast_dtype
from training.sources import DataError
from training.workers import worker_settings

MASS = 0.6
UNTRAINED = "untrained"
_EXAMPLES = 6


class Cells(NamedTuple):
    """A mask's pixels in each patch of a grid: those of the object, and those that count; [N]."""

    inside: Tensor
    counted: Tensor


def cells(mask: ObjectMask, grid: tuple[int, int]) -> Cells:
    """Counts a mask's pixels [H, W] by the patch of `grid` (h, w) that each lies in.

    A pixel lies in the patch that holds its centre when the grid is stretched over the mask. So a
    patch stands for the same pixels as where the map [h, w] is upsampled to [H, W] by its nearest
    value, and the map need not be.
    """
    (height, width), (h, w) = mask.inside.shape, grid
    rows = (2 * np.arange(height) + 1) * h // (2 * height)
    columns = (2 * np.arange(width) + 1) * w // (2 * width)
    place = rows[:, None] * w + columns[None]
    inside, counted = (
        torch.from_numpy(np.bincount(place[pixels], minlength=h * w))
        for pixels in (mask.inside & mask.counted, mask.counted)
    )
    return Cells(inside, counted)


def jaccard(kept: Tensor, inside: Tensor, counted: Tensor) -> Tensor:
    """|A and B| / |A or B| of kept patches A and object B, in pixels: [...]; 0 to 1.

    Args:
        kept: booleans [..., N].
        inside: pixels of the object in each patch, broadcast to [..., N]; see `cells`.
        counted: all pixels in each patch that count, likewise.

    Returns:
        NaN where there is no object.
    """
    inside, counted = inside.double(), counted.double()
    both = (kept * inside).sum(dim=-1)
    objects = inside.sum(dim=-1)
    either = (kept * counted).sum(dim=-1) + objects - both
    return torch.where(objects > 0, both / either, torch.nan)


def score(attention: Tensor, inside: Tensor, counted: Tensor, masses: Sequence[float]) -> Tensor:
    """Jaccard index of each head, and last of the heads' mean map: [B, masses, A + 1].

    Args:
        attention: of CLS to the patches, CLS's own entry left out, [B, A, N].
        inside, counted: pixels in each patch, [B, N]; see `cells`.
        masses: the shares of the mass that are kept; see `backbone.descriptors.mass_mask`.
    """
    maps = torch.cat((attention, attention.mean(dim=1, keepdim=True)), dim=1)
    each = [jaccard(mass_mask(maps, mass), inside[:, None], counted[:, None]) for mass in masses]
    return torch.stack(each, dim=1)


def summarise(scores: Tensor) -> dict[str, Any]:
    """Means over the pictures that have an object; 0 to 1.

    Args:
        scores: of each picture the heads', and last the mean map's, [P, A + 1]; NaN where there is
            no object. At least one picture must have one.
    """
    found = scores[~scores[:, 0].isnan()]
    heads = found[:, :-1]
    return {
        "jaccard_best_head": heads.amax(dim=1).mean().item(),
        "jaccard_mean": heads.mean().item(),
        "jaccard_of_mean_map": found[:, -1].mean().item(),
        "jaccard_per_head": heads.mean(dim=0).tolist(),
    }


@torch.inference_mode()
def evaluate(
    artifact: Artifact,
    pairs: Pairs,
    *,
    size: int,
    masses: Sequence[float],
    here: World,
    precision: str = "fp32",
    batch_size: int = 16,
    workers: int = 2,
    title: str = "attention",
) -> Tensor:
    """Scores of every picture, [P, masses, A + 1], float64 on the CPU; see `score`.

    Each process takes its share and gets all. Views of one size, wherever they stand, go through
    the network together.

    Args:
        artifact: of a network with attention.
        size: the short side of a view in pixels; see `backbone.preprocess.Preprocess.whole`.

    Raises:
        DataError: a picture or mask that cannot be read, or masks of another size than pictures.
    """
    network = artifact.network().to(here.device)
    places = share(len(pairs.masks), here)
    shape = (len(places), len(masses), artifact.architecture.num_heads + 1)
    scores = torch.full(shape, torch.nan, dtype=torch.float64)
    loader = DataLoader(
        _Samples(pairs, places, view_of(artifact, size), artifact.architecture.patch_size),
        batch_size=None,
        pin_memory=here.device.type == "cuda",
        **worker_settings(workers),
    )
    with tqdm(
        total=len(places), unit="picture", desc=title, dynamic_ncols=True, disable=not here.is_main
    ) as bar:
        for batch in _alike(loader, batch_size):
            views, inside, counted = (
                torch.stack([getattr(sample, part) for sample in batch]).to(here.device)
                for part in ("view", "inside", "counted")
            )
            attention = cls_attention(network, views, here.device, precision)
            found = score(attention, inside, counted, masses).cpu()
            scores[[sample.place - places.start for sample in batch]] = found
            bar.update(len(batch))
    return gather_rows(scores.to(here.device), here).cpu()


def cls_attention(network: Backbone, views: Tensor, device: torch.device, precision: str) -> Tensor:
    """Of CLS to the patches in the last block, [B, A, N] float32."""
    with autocast(device, autocast_dtype(precision, device)):
        found: Tensor = network(views, attention="cls").attention
    return found[:, :, 1:].float()


def view_of(artifact: Artifact, size: int) -> Callable[[Any], Tensor]:
    """Picture -> the whole of it, its short side near `size`, both sides multiples of a patch."""

    def view(picture: Any) -> Tensor:
        return artifact.preprocess.whole(
            picture, short_side=size, multiple=artifact.architecture.patch_size
        )

    return view


class _Sample(NamedTuple):
    place: int
    view: Tensor
    inside: Tensor
    counted: Tensor


class _Samples(Dataset[_Sample]):
    def __init__(
        self, pairs: Pairs, places: range, view: Callable[[Any], Tensor], patch_size: int
    ) -> None:
        self._pairs, self._places, self._view = pairs, places, view
        self._patch_size = patch_size

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, i: int) -> _Sample:
        place = self._places[i]
        picture, mask = self._pairs.read(place)
        view = self._view(picture)
        height, width = view.shape[-2:]
        grid = (height // self._patch_size, width // self._patch_size)
        return _Sample(place, view, *cells(mask, grid))


def _alike(samples: Any, batch_size: int) -> Iterator[list[_Sample]]:
    """Batches of views of one size; at most 4 batches' views wait for others of their size."""
    waiting: dict[tuple[int, ...], list[_Sample]] = {}
    for sample in samples:
        of_size = waiting.setdefault(tuple(sample.view.shape), [])
        of_size.append(sample)
        if len(of_size) == batch_size:
            yield waiting.pop(tuple(sample.view.shape))
        elif sum(map(len, waiting.values())) >= 4 * batch_size:
            yield waiting.pop(max(waiting, key=lambda shape: len(waiting[shape])))
    yield from waiting.values()


def add_command(names: Any) -> None:
    """Adds `attention_jaccard` to the command line of `python -m training.evaluation`."""
    parser: argparse.ArgumentParser = names.add_parser(
        "attention_jaccard", help=__doc__, description=__doc__
    )
    add_common_options(parser, batch_size=16)
    add_data_options(parser)
    parser.add_argument("--mass", type=float, nargs="+", default=[MASS], help="kept; 0.6, 0.8")
    parser.add_argument(
        "--size", type=positive, help="short side of views (default: 480/224 of the model's crop)"
    )
    parser.add_argument(
        "--beside", nargs="+", default=[], metavar="M", help=f"other models, or {UNTRAINED!r}"
    )
    parser.add_argument("--seed", type=whole, default=0, help=f"of {UNTRAINED!r}")
    parser.add_argument("--save-examples", type=Path, metavar="FILE.png")
    parser.set_defaults(run=_run)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Adds --images, --masks and --voc; see `open_data`."""
    parser.add_argument("--images", type=Path, help="a folder of pictures ...")
    parser.add_argument("--masks", type=Path, help="... and one of their masks, of the same names")
    parser.add_argument("--voc", type=Path, help="instead of both: VOC2012")


def open_data(options: argparse.Namespace) -> Pairs:
    """What the options of `add_data_options` name.

    Raises:
        ConfigError: not just one form of data.
        DataError: data that cannot be used.
    """
    pair = (options.images, options.masks)
    if options.voc is not None and pair == (None, None):
        return open_voc(options.voc)
    if options.voc is not None or None in pair:
        raise ConfigError("give --images DIR and --masks DIR, or --voc DIR alone")
    return open_pairs(*pair)


def _run(options: argparse.Namespace) -> None:
    for mass in options.mass:
        if not 0.0 < mass <= 1.0:
            raise ConfigError(f"--mass {mass}: must be above 0 and at most 1")
    with session(options) as own:
        models = {options.model: own.model}
        for name in options.beside:
            models[name] = _untrained(own.model, options.seed) if name == UNTRAINED else _load(name)
        for name, model in models.items():
            _check(name, model.artifact, options.size)
        pairs = open_data(options)
        results = {
            name: _measure(model, name, pairs, options, own) for name, model in models.items()
        }
        scores, figures = results[options.model]
        empty = int(scores[:, 0, 0].isnan().sum())
        beside = {name: results[name][1] | describe_model(models[name]) for name in options.beside}
        if options.save_examples is not None and own.here.is_main:
            _save_examples(options, own, pairs, scores)
        paths = [path for path in (options.images, options.masks, options.voc) if path is not None]
        tell(
            options,
            own,
            name="attention_jaccard",
            figures={**figures, **({"beside": beside} if beside else {})},
            protocol={
                "mass": options.mass,
                "size": figures["size"],
                "view": "whole picture in its proportions, both sides multiples of the patch",
                "mask": pairs.rule,
                "upsampling": "nearest",
                **({"seed": options.seed} if UNTRAINED in options.beside else {}),
            },
            data={**describe_data(paths, pairs.pictures), "empty_masks": empty},
            table=_table({name: found for name, (_, found) in results.items()}, scores, empty),
        )


def _measure(
    model: NamedModel, name: str, pairs: Pairs, options: argparse.Namespace, own: Session
) -> tuple[Tensor, dict[str, Any]]:
    """Every picture's scores, and the figures: those of the first mass, and of each."""
    size = _size(options.size, model.artifact)
    scores = evaluate(
        model.artifact,
        pairs,
        size=size,
        masses=options.mass,
        here=own.here,
        precision=own.precision,
        batch_size=own.batch_size,
        workers=own.workers,
        title=name,
    )
    if bool(scores[:, 0, 0].isnan().all()):
        raise DataError(f"none of the {len(scores)} masks holds an object; {pairs.rule}")
    each = {str(mass): summarise(scores[:, i]) for i, mass in enumerate(options.mass)}
    return scores, {**each[str(options.mass[0])], "masses": each, "size": size}


def _load(name: str) -> NamedModel:
    model = load_model(name)
    check_channels(model)
    return model


def _untrained(model: NamedModel, seed: int) -> NamedModel:
    """The same architecture with weights as training begins with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = model.artifact.architecture.build().state_dict()
    artifact = dataclasses.replace(
        model.artifact, weights=weights, provenance={"untrained": True, "seed": seed}, quality={}
    )
    return NamedModel(name=UNTRAINED, artifact=artifact)


def _check(name: str, artifact: Artifact, size: int | None) -> None:
    architecture = artifact.architecture
    if not architecture.has_attention:
        raise ArtifactError(
            f"model {name!r} is a {architecture.name}, a convolutional network: it has no "
            "attention to measure; take a ViT"
        )
    if _size(size, artifact) < architecture.patch_size:
        raise ConfigError(
            f"--size {size} is smaller than a patch of model {name!r}, {architecture.patch_size}"
        )


def _size(size: int | None, artifact: Artifact) -> int:
    """The original looks at 480 pixels with networks trained on 224; others in proportion."""
    return size if size is not None else round(artifact.preprocess.crop * 480 / 224)


def _save_examples(options: argparse.Namespace, own: Session, pairs: Pairs, scores: Tensor) -> None:
    """Draws a few pictures that have an object, evenly spaced."""
    having = (~scores[:, 0, 0].isnan()).nonzero().flatten().tolist()
    chosen = [having[i * len(having) // _EXAMPLES] for i in range(_EXAMPLES)]
    network = own.artifact.network().to(own.here.device)
    view = view_of(own.artifact, _size(options.size, own.artifact))
    rows = []
    for i in dict.fromkeys(chosen):
        pair = pairs.read(i)
        one = view(pair.picture)[None].to(own.here.device)
        with torch.inference_mode():
            attention = cls_attention(network, one, own.here.device, own.precision)[0]
        best = int(scores[i, 0, :-1].argmax())
        kept = mass_mask(attention[best], options.mass[0])
        columns = one.shape[-1] // own.artifact.architecture.patch_size
        rows.append(draw_example(pair, kept.reshape(-1, columns).cpu().numpy()))
    options.save_examples.parent.mkdir(parents=True, exist_ok=True)
    sheet(rows).save(options.save_examples)


def _table(results: dict[str, dict[str, Any]], scores: Tensor, empty: int) -> str:
    lines = [f"attention Jaccard of {len(scores) - empty} pictures, in percent"]
    if empty:
        lines[0] += f" ({empty} left out: their masks hold no object)"
    wide = max(map(len, results)) + 2
    lines.append(
        f"  {'model':<{wide}}{'mass':>5}{'size':>6}{'best head':>11}{'mean head':>11}"
        f"{'mean map':>10}  each head"
    )
    for name, result in results.items():
        for mass, found in result["masses"].items():
            heads = " ".join(f"{100 * value:.1f}" for value in found["jaccard_per_head"])
            lines.append(
                f"  {name:<{wide}}{mass:>5}{result['size']:>6}"
                f"{100 * found['jaccard_best_head']:>11.2f}{100 * found['jaccard_mean']:>11.2f}"
                f"{100 * found['jaccard_of_mean_map']:>10.2f}  {heads}"
            )
    return "\n".join(lines)
