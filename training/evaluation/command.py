"""What every evaluation's command line shares: its options, its model, how results are told."""

import argparse
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from backbone.artifact import Artifact, ArtifactError
from backbone.pretrained import NamedModel, load_model
from training.distributed import World, world
from training.environment import environment
from training.evaluation.features import reading_workers
from training.evaluation.outputs import check_file, writing
from training.sources import Pictures


@dataclass(frozen=True)
class Session:
    """One evaluation under way: this process, the model, and the common options."""

    here: World
    model: NamedModel
    precision: str
    batch_size: int
    workers: int

    @property
    def artifact(self) -> Artifact:
        """The model's."""
        return self.model.artifact


def add_common_options(parser: argparse.ArgumentParser, *, batch_size: int = 256) -> None:
    """Adds --model, --device, --precision, --batch-size, --workers, --json and --save."""
    parser.add_argument("--model", required=True, help="default, a known name, or a path")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument(
        "--precision", default="fp32", choices=["fp32", "bf16", "fp16", "auto"], help="of forwards"
    )
    parser.add_argument("--batch-size", type=positive, default=batch_size, help="of each process")
    parser.add_argument(
        "--workers", type=whole, help="processes that read pictures; where left out, 0 on a CPU"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, no table")
    parser.add_argument("--save", type=Path, metavar="FILE.json", help="also write the JSON here")


@contextmanager
def session(options: argparse.Namespace) -> Iterator[Session]:
    """Joins the processes and loads the model that the common options name.

    Raises:
        ArtifactError: a model that cannot be loaded, or that takes no pictures from files.
        ConfigError: a device that is not there, or a file of --save that cannot be written.
    """
    model = load_model(options.model)
    check_channels(model)
    with world(options.device) as here:
        if here.is_main and options.save is not None:
            check_file("--save", options.save)
        workers = reading_workers(here.device) if options.workers is None else options.workers
        yield Session(here, model, options.precision, options.batch_size, workers)


def check_channels(model: NamedModel) -> None:
    """Refuses a model whose pictures cannot be made from picture files.

    Raises:
        ArtifactError: names the model, its channels and those that files give.
    """
    try:
        _ = model.artifact.preprocess.mode
    except ValueError as error:
        raise ArtifactError(f"--model {model.name}: {error}") from error


def tell(
    options: argparse.Namespace,
    session: Session,
    *,
    name: str,
    figures: Mapping[str, Any],
    protocol: Mapping[str, Any],
    data: Mapping[str, Any],
    table: str,
) -> None:
    """Prints the table, or with --json one JSON object, and saves that with --save.

    The first process speaks; the others are silent.

    Args:
        name: the evaluation's.
        figures: the results; they stand at the top of the JSON object.
        protocol: every setting that the results depend on.
        data: what was evaluated; see `describe_data`.
        table: for people; lines.

    Raises:
        ConfigError: the file of --save cannot be written.
    """
    if not session.here.is_main:
        return
    found = {
        "evaluation": name,
        **figures,
        **describe_model(session.model),
        "protocol": {**protocol, "precision": session.precision},
        "data": data,
        "environment": environment(session.here),
    }
    text = json.dumps(found)
    print(text if options.json else table, flush=True)
    if options.save is not None:
        with writing("--save", options.save):
            options.save.write_text(text + "\n", encoding="utf-8")


def describe_model(model: NamedModel) -> dict[str, Any]:
    """What tells the model from every other: its name, fingerprint, architecture and sizes."""
    artifact = model.artifact
    return {
        "model": model.name,
        "fingerprint": artifact.fingerprint,
        "architecture": asdict(artifact.architecture),
        "preprocess": asdict(artifact.preprocess),
    }


def describe_data(paths: Sequence[str | Path], pictures: Pictures) -> dict[str, Any]:
    """Where pictures came from, how many they are, and a hash of their names in order."""
    digest = hashlib.sha256("\n".join(pictures.names).encode()).hexdigest()
    return {
        "paths": [str(path) for path in paths],
        "pictures": len(pictures.names),
        "names_sha256": digest,
    }


def positive(text: str) -> int:
    """An option's whole number from 1 up."""
    return _at_least(1, text)


def whole(text: str) -> int:
    """An option's whole number from 0 up."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} up")
    return value
