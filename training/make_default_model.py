"""Makes the model in the repository: pretrain, export, measure, and put the file in its place.

    python -m training.make_default_model RECIPE.toml --data FOLDER [--run-dir RUN_DIR]

FOLDER holds tiny-imagenet-train-*.tar.gz and tiny-imagenet-val.tar.gz. A run that is in RUN_DIR
goes on from its last snapshot, and one that has ended is only exported and measured. The k-NN
top-1 of the model is measured beside raw pixels and the same network untrained, and is written
into the file's header and beside the file as `.quality.json`.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from backbone.artifact import Artifact
from backbone.preprocess import Preprocess
from backbone.pretrained import DEFAULT_MODEL
from training.config import Recipe, load_recipe
from training.distributed import World, world
from training.evaluation import knn
from training.evaluation.features import Embed, View, embedder
from training.evaluation.labelled import train_and_val
from training.export import export, teacher_artifact, whitened
from training.pretrain import pretrain
from training.sources import Pictures, open_pictures

PIXELS = 64  # side of the data set's pictures


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 2 for what cannot be made."""
    parser = argparse.ArgumentParser(
        prog="python -m training.make_default_model", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--data", type=Path, required=True, help="folder of the tar files")
    parser.add_argument("--run-dir", type=Path, help="default: the recipe's")
    parser.add_argument("--out", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--input", type=int, default=64, help="side at which it is served, pixels")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="measuring")
    parser.add_argument("--no-train", action="store_true", help="export what RUN_DIR holds")
    options = parser.parse_intermixed_args(arguments)
    try:
        train = sorted(options.data.glob("tiny-imagenet-train-*.tar.gz"))
        val = options.data / "tiny-imagenet-val.tar.gz"
        if not (train and val.exists()):
            raise ValueError(
                f"--data {options.data}: must be a folder with tiny-imagenet-train-*.tar.gz and "
                f"{val.name}; it has {len(train)} of the former and "
                f"{'the' if val.exists() else 'not the'} latter"
            )
        overrides = [f"data.train={json.dumps([str(path) for path in train])}", *options.overrides]
        if options.run_dir is not None:
            overrides.append(f"run_dir={json.dumps(str(options.run_dir))}")
        recipe = load_recipe(options.recipe, overrides)
        with world(recipe.device) as here:
            if not options.no_train:
                pretrain(recipe, here)
            if not here.is_main:
                return 0
            make(
                recipe,
                open_pictures(train),
                open_pictures([val]),
                options.out,
                side=options.input,
                device=here.device,
                k=options.k,
                precision=options.precision,
            )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def make(
    recipe: Recipe,
    bank: Pictures,
    val: Pictures,
    out: Path,
    *,
    side: int,
    device: torch.device,
    k: int,
    precision: str,
) -> None:
    """Exports the run's teacher in half precision, whitened, with its own figures in its header."""
    sizes = {"resize": side, "crop": side, "copy_size": side}
    artifact = teacher_artifact(Path(recipe.run_dir), half=True, licence="Apache-2.0", sizes=sizes)
    artifact = whitened(artifact, bank, device=device)
    figures = measure(artifact, bank, val, device=device, k=k, precision=precision)
    quality = {"knn": {str(k): figures["model"]}, "measured": figures, "precision": precision}
    fingerprint = export(dataclasses.replace(artifact, quality=quality), out)
    out.with_suffix(".quality.json").write_text(json.dumps(quality, indent=2) + "\n")
    print(f"{out}: fingerprint {fingerprint}")
    for name, figure in figures.items():
        print(f"{name:>10}: k-NN top-1 {figure['top1']:.2f} %, top-5 {figure['top5']:.2f} %")


def measure(
    artifact: Artifact,
    bank: Pictures,
    val: Pictures,
    *,
    device: torch.device,
    k: int,
    precision: str,
) -> dict[str, dict[str, float]]:
    """k-NN of `val` against `bank` in percent: the model, the network untrained, and pixels."""
    torch.manual_seed(0)
    weights = artifact.architecture.build().state_dict()
    untrained = embedder(
        dataclasses.replace(artifact, weights=weights), device, precision=precision
    )
    trained = embedder(artifact, device, precision=precision)
    view, pixels = artifact.preprocess.centre_crop, Preprocess(resize=PIXELS, crop=PIXELS)
    methods: dict[str, tuple[View, Embed]] = {
        "model": (view, trained),
        "untrained": (view, untrained),
        "pixels": (pixels.centre_crop, lambda batch: {"cls": batch.flatten(1)}),
    }
    here, labelled = World(0, 1, device), train_and_val(bank, val)
    found = {
        name: knn.evaluate(*labelled, view, embed, ks=[k], here=here)["cls"][str(k)]
        for name, (view, embed) in methods.items()
    }
    return {
        name: {score: round(value, 2) for score, value in figures.items()}
        for name, figures in found.items()
    }


if __name__ == "__main__":
    sys.exit(main())
