"""Copy detection: Copydays (paper, section 4.2), or copies made of any folder of pictures."""

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from backbone.preprocess import Preprocess
from training.config import ConfigError
from training.evaluation.command import (
    Session,
    add_common_options,
    describe_data,
    positive,
    session,
    tell,
)
from training.evaluation.copy_search import (
    KEPT,
    CopyBenchmark,
    Settings,
    Variant,
    copy_figures,
    search,
)
from training.evaluation.copy_whitening import Moments
from training.evaluation.copydays import open_copydays
from training.evaluation.features import View, embedder, stream
from training.evaluation.outputs import check_file
from training.evaluation.synthetic_copies import LEAST, contact_sheet, synthetic_benchmark
from training.sources import DataError, Pictures, open_pictures


def fit_variants(
    background: Pictures, settings: Settings, *, descriptor: str, dimension: int
) -> dict[str, Variant]:
    """The whitenings "original" (uncentred, the original's quirk) and "centred" of a background.

    Its vectors are not held: moments are summed while they stream.

    Args:
        dimension: the descriptor's length.

    Raises:
        DataError: a picture that cannot be read.
        ValueError: fewer than 2 pictures.
    """
    view, embed, here, batch_size, workers = settings
    moments = Moments(dimension, here.device)
    for _, found in stream(
        background,
        view,
        embed,
        here=here,
        batch_size=batch_size,
        workers=workers,
        title="whitening",
    ):
        moments.add(found[descriptor])
    moments.reduce()
    return {
        "original": moments.whitening(centred=False),
        "centred": moments.whitening(centred=True),
    }


def add_command(names: Any) -> None:
    """Adds `copy_detection` to the command line of `python -m training.evaluation`."""
    parser: argparse.ArgumentParser = names.add_parser(
        "copy_detection", help=__doc__, description=__doc__
    )
    add_common_options(parser, batch_size=64)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--data", type=Path, help="Copydays: original/, strong/, crops/N/, jpeg/N/")
    data.add_argument("--synthetic", nargs="+", help="pictures to make copies of")
    parser.add_argument(
        "--distractors", nargs="+", default=[], help="pictures to hide the originals among"
    )
    parser.add_argument("--whitening", nargs="+", help="pictures that whitening is fitted on")
    parser.add_argument("--descriptor", default="copy", choices=["copy", "cls"])
    parser.add_argument(
        "--size", type=positive, help="side in pixels that pictures are squashed to for copy"
    )
    parser.add_argument("--kept", type=positive, default=KEPT, help="neighbours of each copy")
    parser.add_argument("--seed", type=int, help="of --synthetic, 0 by default")
    parser.add_argument(
        "--count", type=positive, help=f"originals of --synthetic that are copied, from {LEAST} up"
    )
    parser.add_argument(
        "--save-examples", type=Path, metavar="FILE.png", help="every transformation of --synthetic"
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    _check(options)
    with session(options) as own:
        benchmark = _open(options, own)
        view, seen = _view(options, own)
        settings = Settings(
            view,
            embedder(
                own.artifact,
                own.here.device,
                precision=own.precision,
                descriptors=[options.descriptor],
            ),
            own.here,
            own.batch_size,
            own.workers,
        )
        background = _background(options, own)
        variants = _variants(background, settings, options.descriptor, own)
        found = search(
            benchmark, settings, variants, descriptor=options.descriptor, kept=options.kept
        )
        figures = {name: copy_figures(benchmark, each) for name, each in found.items()}
        tell(
            options,
            own,
            name="copy_detection",
            figures={"copy_detection": figures},
            protocol={
                "descriptor": options.descriptor,
                **seen,
                "kept": options.kept,
                "average_precision": "trapezoids",
                **({"seed": options.seed or 0} if options.synthetic else {}),
            },
            data={
                "queries": describe_data(options.synthetic or [options.data], benchmark.queries),
                "database": describe_data(
                    [*(options.synthetic or [options.data]), *options.distractors],
                    benchmark.database,
                ),
                "whitening": describe_data(options.whitening, background) if background else None,
            },
            table=_table(benchmark, figures, own),
        )


def _check(options: argparse.Namespace) -> None:
    for name in ("seed", "count", "save_examples"):
        if options.data and getattr(options, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} belongs to --synthetic, not --data")
    if options.synthetic and options.distractors:
        raise ConfigError(
            "--distractors belongs to --data; --synthetic hides originals among its other pictures"
        )
    if options.size is not None and options.descriptor != "copy":
        raise ConfigError("--size belongs to --descriptor copy; cls has the model's own view")


def _open(options: argparse.Namespace, own: Session) -> CopyBenchmark:
    if options.data:
        return open_copydays(options.data, options.distractors)
    pictures, seed = open_pictures(options.synthetic), options.seed or 0
    benchmark = synthetic_benchmark(pictures, seed=seed, count=options.count)
    if options.save_examples and own.here.is_main:
        check_file("--save-examples", options.save_examples)
        sheet = contact_sheet(pictures, seed=seed, count=options.count)
        sheet.save(options.save_examples, "PNG")
    return benchmark


def _view(options: argparse.Namespace, own: Session) -> tuple[View, dict[str, Any]]:
    """The view of the descriptor, and what the protocol says of it."""
    preprocess, architecture = own.artifact.preprocess, own.artifact.architecture
    if options.descriptor == "cls":
        return preprocess.centre_crop, {"view": "centre_crop"}
    if options.size is not None:
        try:
            architecture.check_side("--size", options.size)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        preprocess = dataclasses.replace(preprocess, copy_size=options.size)
    multiple = architecture.patch_size
    side = max(1, round(preprocess.copy_size / multiple)) * multiple
    view = partial(Preprocess.squash, preprocess, multiple=multiple)
    return view, {"view": "squash", "size": side}


def _variants(
    background: Pictures | None, settings: Settings, descriptor: str, own: Session
) -> dict[str, Variant]:
    """Without whitening, with those of the background, and else with the artifact's own."""
    variants: dict[str, Variant] = {"none": _unit}
    whitening = own.artifact.whitening
    if background is not None:
        variants |= fit_variants(
            background,
            settings,
            descriptor=descriptor,
            dimension=_dimension(descriptor, own),
        )
    elif descriptor == "cls" and whitening is not None:
        device = own.here.device
        moved = dataclasses.replace(
            whitening, mean=whitening.mean.to(device), matrix=whitening.matrix.to(device)
        )
        variants["artifact"] = moved.apply
    return variants


def _background(options: argparse.Namespace, own: Session) -> Pictures | None:
    if not options.whitening:
        return None
    background, dimension = open_pictures(options.whitening), _dimension(options.descriptor, own)
    count = len(background.names)
    if count < 2:
        raise DataError(f"--whitening holds {count} picture; whitening needs at least 2")
    if count < 2 * dimension and own.here.is_main:
        print(
            f"warning: --whitening holds {count} pictures for {dimension} dimensions; "
            f"{2 * dimension} are the least that tell a covariance",
            file=sys.stderr,
        )
    return background


def _dimension(descriptor: str, own: Session) -> int:
    architecture = own.artifact.architecture
    return architecture.embed_dim + (architecture.token_dim if descriptor == "copy" else 0)


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors, dim=1)


def _table(benchmark: CopyBenchmark, figures: Mapping[str, Mapping[str, Any]], own: Session) -> str:
    """A row for each block, and three columns for each whitening."""
    columns = ("map", "recall_at_1", "micro_ap")
    lines = [
        f"copy detection: {len(benchmark.queries.names)} copies among "
        f"{len(benchmark.database.names)} pictures, model {own.model.name}; %",
        f"  {'whitening':<16}" + "".join(f" | {name:^20}" for name in figures),
        f"  {'':<16}" + " |    mAP    R@1     µAP" * len(figures),
    ]
    for block in benchmark.blocks:
        cells = ((each["blocks"][block][column] for column in columns) for each in figures.values())
        lines.append(f"  {block:<16}" + "".join(" | " + " ".join(map(_cell, row)) for row in cells))
    total = "".join(f" | {'':13} {_cell(each['micro_ap'])}" for each in figures.values())
    return "\n".join([*lines, f"  {'all':<16}{total}"])


def _cell(value: float | None) -> str:
    return f"{'-':>6}" if value is None else f"{value:6.1f}"
