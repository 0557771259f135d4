"""Snapshot -> artifact: the teacher's backbone, as one file that the service loads.

python -m training.export RUN_DIR OUT.safetensors [--half] [--quality quality.json]
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from backbone.artifact import (
    Artifact,
    ArtifactError,
    half_precision,
    read_artifact,
    write_artifact,
)
from backbone.preprocess import Preprocess
from backbone.whitening import check_enough, fit_whitening
from training import snapshot
from training.config import ConfigError, recipe_from_dict
from training.distributed import World
from training.evaluation.features import embedder, extract
from training.sources import Pictures, every, open_pictures

WHITEN_COUNT = 5000


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 2 for what cannot be exported."""
    parser = argparse.ArgumentParser(prog="python -m training.export", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run_dir", type=Path, help="a run of training.pretrain")
    parser.add_argument("out", type=Path, help="the .safetensors file to write")
    parser.add_argument("--student", action="store_true", help="the student in the teacher's place")
    parser.add_argument("--half", action="store_true", help="store float16: half the size")
    parser.add_argument("--resize", type=int, help="evaluation: short side in pixels")
    parser.add_argument("--crop", type=int, help="evaluation: centre crop in pixels")
    parser.add_argument("--copy-size", type=int, help="side of the copy descriptor's picture")
    parser.add_argument("--licence", default="", help="the licence of the weights")
    parser.add_argument("--quality", type=Path, help="JSON of what was measured, for the header")
    parser.add_argument(
        "--whiten",
        nargs="+",
        metavar="DATA",
        help=f"folders or tars of which {WHITEN_COUNT} pictures fit the whitening of searches",
    )
    options = parser.parse_args(arguments)
    if options.out.suffix != ".safetensors":
        parser.error(f"OUT is {str(options.out)!r}; it must end in .safetensors")
    try:
        quality = json.loads(options.quality.read_text()) if options.quality else {}
        artifact = teacher_artifact(
            options.run_dir,
            key="student" if options.student else "teacher",
            half=options.half,
            licence=options.licence,
            sizes={
                name: value
                for name in ("resize", "crop", "copy_size")
                if (value := getattr(options, name)) is not None
            },
        )
        artifact = dataclasses.replace(artifact, quality=quality)
        if options.whiten:
            background = open_pictures(options.whiten)
            artifact = whitened(artifact, background, device=torch.device("cpu"))
        fingerprint = export(artifact, options.out)
    except (ArtifactError, ConfigError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = options.out.stat().st_size / 1e6
    print(f"{options.out}: {size:.1f} MB, fingerprint {fingerprint}")
    return 0


def teacher_artifact(
    run_dir: Path,
    *,
    key: str = "teacher",
    half: bool = False,
    licence: str = "",
    sizes: Mapping[str, int] | None = None,
) -> Artifact:
    """The newest snapshot's backbone, not yet written.

    Args:
        key: "teacher" (the paper's choice) or "student".
        half: parameters in float16.
        sizes: fields of `Preprocess` that differ from the paper's proportions for the run's
            global crops.

    Raises:
        SnapshotError: there is no usable snapshot in `run_dir`.
        ValueError: impossible sizes.
    """
    found = snapshot.newest_good(run_dir)
    if found is None:
        raise snapshot.SnapshotError(f"{run_dir} holds no snapshot (snapshots/step_*.pt)")
    for warning in found.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    state = found.state
    recipe = recipe_from_dict(state["recipe"])
    prefix = "backbone."
    weights = {
        name.removeprefix(prefix): tensor
        for name, tensor in state[key].items()
        if name.startswith(prefix)
    }
    architecture = recipe.architecture
    paper = Preprocess.in_proportion(recipe.crops.global_size, patch_size=architecture.patch_size)
    return Artifact(
        architecture=architecture,
        preprocess=dataclasses.replace(
            paper, mean=recipe.data.mean, std=recipe.data.std, **(sizes or {})
        ),
        weights=half_precision(weights, architecture) if half else weights,
        provenance={
            "licence": licence,
            "method": "DINO (arXiv 2104.14294)",
            "network": key,
            "recipe": _published(state["recipe"]),
            "steps": state["step"],
            "torch": str(torch.__version__),
        },
    )


def whitened(
    artifact: Artifact, background: Pictures, *, device: torch.device, count: int = WHITEN_COUNT
) -> Artifact:
    """The artifact with the whitening of `count` pictures, evenly spaced in `background`.

    Raises:
        ValueError: too few pictures for the network's embedding size.
    """
    chosen = every(background, count)
    check_enough(len(chosen.names), artifact.architecture.embed_dim)
    view, embed = artifact.preprocess.centre_crop, embedder(artifact, device)
    vectors = extract(chosen, view, embed, here=World(0, 1, device))["cls"]
    provenance = {**artifact.provenance, "whitened_on": len(chosen.names)}
    return dataclasses.replace(artifact, whitening=fit_whitening(vectors), provenance=provenance)


def export(artifact: Artifact, out: Path) -> str:
    """Writes `out`, reads it back, and returns its fingerprint.

    Raises:
        ArtifactError: what was written does not read back as it was.
    """
    fingerprint = write_artifact(artifact, out)
    written = read_artifact(out)
    for name, tensor in artifact.weights.items():
        if not torch.equal(written.weights[name], tensor):
            raise ArtifactError(f"{name} in {out} is not what was written")
    return fingerprint


def _published(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe without what is the trainer's own affair: folders of their machine."""
    kept = {key: value for key, value in recipe.items() if key != "run_dir"}
    train = [Path(path).name for path in recipe["data"]["train"]]
    return {**kept, "data": {**recipe["data"], "train": train}}


if __name__ == "__main__":
    sys.exit(main())
