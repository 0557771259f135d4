"""Whether attention finds the object: the Jaccard index of masked CLS attention (paper, fig. 4)."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbone.artifact import Artifact, ArtifactError
from backbone.descriptors import mass_mask
from backbone.pretrained import NamedModel, load_model
from training.config import ConfigError
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
from training.evaluation.jaccard import cls_attention, default_size, evaluate, summarise, view_of
from training.evaluation.masks import Pairs, open_pairs, open_voc
from training.evaluation.outputs import check_file
from training.sources import DataError

MASS = 0.6
UNTRAINED = "untrained"
_EXAMPLES = 6


def add_command(names: Any) -> None:
    """Adds `attention_jaccard` to the command line of `python -m training.evaluation`."""
    parser: argparse.ArgumentParser = names.add_parser(
        "attention_jaccard", help=__doc__, description=__doc__
    )
    add_common_options(parser, batch_size=16)
    parser.add_argument("--images", type=Path, help="a folder of pictures ...")
    parser.add_argument("--masks", type=Path, help="... and one of their masks, of the same names")
    parser.add_argument("--voc", type=Path, help="instead of both: VOC2012")
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


def _run(options: argparse.Namespace) -> None:
    for mass in options.mass:
        if not 0.0 < mass <= 1.0:
            raise ConfigError(f"--mass {mass}: must be above 0 and at most 1")
    with session(options) as own:
        if options.save_examples is not None and own.here.is_main:
            check_file("--save-examples", options.save_examples)
        asked = options.model if own.model.name in options.beside else own.model.name
        models = {asked: own.model}
        for name in options.beside:
            models[name] = _untrained(own.model, options.seed) if name == UNTRAINED else _load(name)
        for name, model in models.items():
            _check(name, model.artifact, options.size)
        pairs = _open_data(options)
        results = {name: _measure(model, pairs, options, own) for name, model in models.items()}
        scores, figures = results[asked]
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


def _open_data(options: argparse.Namespace) -> Pairs:
    pair = (options.images, options.masks)
    if options.voc is not None and pair == (None, None):
        return open_voc(options.voc)
    if options.voc is not None or None in pair:
        raise ConfigError("give --images DIR and --masks DIR, or --voc DIR alone")
    return open_pairs(*pair)


def _measure(
    model: NamedModel, pairs: Pairs, options: argparse.Namespace, own: Session
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
        title=model.name,
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
    return size if size is not None else default_size(artifact)


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
    sheet(rows).save(options.save_examples, "PNG")


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
