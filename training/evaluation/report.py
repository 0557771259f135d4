"""Runs evaluations and writes one page: figures, attention, neighbours, confusion."""

import argparse
import contextlib
import dataclasses
import io
import json
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from backbone.artifact import ArtifactError
from training.config import ConfigError
from training.data import one_line
from training.distributed import World
from training.evaluation.command import (
    Session,
    add_common_options,
    positive,
    session,
    tell,
    whole,
)
from training.evaluation.labelled import open_train_and_val
from training.evaluation.outputs import check_folder
from training.evaluation.report_parts import Attention, Confusion, K, Part, ask, look_at
from training.sources import DataError, open_pictures
from training.workers import ending_workers

T = TypeVar("T")

_BATCH_SIZE = 64
_DATA: Mapping[str, str] = {
    "train": "labelled pictures to learn from: knn, linear",
    "val": "labelled pictures to test on: knn, linear",
    "images": "pictures with masks: attention_jaccard ...",
    "masks": "... and their masks",
    "voc": "VOC2012: attention_jaccard, instead of both",
    "retrieval": "ROxford5k or RParis6k: retrieval",
    "retrieval-labels": "any class folders: retrieval",
    "copydays": "copy_detection",
    "synthetic-copies": "any folder of pictures: copy_detection",
    "davis": "DAVIS 2017: video_segmentation",
}
"""The options that name data, without their dashes, and what they are for."""

_SOURCES: Mapping[str, str] = {
    **dict.fromkeys(("images", "val", "train", "synthetic-copies", "retrieval-labels"), ""),
    "voc": "JPEGImages",
    "davis": "JPEGImages",
    **dict.fromkeys(("retrieval", "copydays"), ""),
}
"""Where pictures for attention maps are taken from, the first that is given: option -> folder."""

_MEASURES = ("evaluation", "model", "fingerprint", "architecture", "preprocess")


class Job(NamedTuple):
    """One evaluation: what the page calls it, its command, and what that needs.

    Attributes:
        name: of its part of the page, and of its file.
        evaluation: the command.
        data: (option of the command, option of the report) for each of its data.
        out: the option of the command that wants a folder to write into; "" for none.
    """

    name: str
    evaluation: str
    data: tuple[tuple[str, str], ...]
    out: str = ""


_LABELLED = (("--train", "train"), ("--val", "val"))
JOBS = (
    Job("knn", "knn", _LABELLED),
    Job("linear", "linear", _LABELLED, out="--out"),
    Job("attention_jaccard", "attention_jaccard", (("--images", "images"), ("--masks", "masks"))),
    Job("attention_jaccard_voc", "attention_jaccard", (("--voc", "voc"),)),
    Job("retrieval", "retrieval", (("--data", "retrieval"),)),
    Job("retrieval_labels", "retrieval", (("--labels", "retrieval-labels"),)),
    Job("copydays", "copy_detection", (("--data", "copydays"),)),
    Job("synthetic_copies", "copy_detection", (("--synthetic", "synthetic-copies"),)),
    Job("video_segmentation", "video_segmentation", (("--data", "davis"),), out="--out"),
)


def add_command(names: Any) -> None:
    """Adds `report` to the command line of `python -m training.evaluation`."""
    parser: argparse.ArgumentParser = names.add_parser("report", help=__doc__, description=__doc__)
    add_common_options(parser)
    # What is not given, each evaluation decides for itself.
    parser.set_defaults(
        batch_size=None, workers=None, default_workers=parser.get_default("workers")
    )
    parser.add_argument("--out", type=Path, required=True, help="gets report.html and NAME.json")
    for option, words in _DATA.items():
        several = "+" if option in ("train", "val") else None
        parser.add_argument(f"--{option}", nargs=several, metavar="DATA", help=words)
    known = list(dict.fromkeys(job.evaluation for job in JOBS))
    parser.add_argument(
        "--evaluations",
        nargs="+",
        choices=known,
        metavar="NAME",
        help=f"of {', '.join(known)} (default: all whose data is given)",
    )
    parser.add_argument(
        "--options",
        nargs="+",
        default=[],
        metavar='NAME="--MORE"',
        help='more options for an evaluation, or a part of the page: linear="--epochs 10"',
    )
    parser.add_argument("--pictures", type=positive, default=6, help="whose attention is shown")
    parser.add_argument("--queries", type=positive, default=8, help="whose neighbours are shown")
    parser.add_argument("--seed", type=whole, default=0, help="of the choice of queries")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    jobs, more = _chosen(options), _more(options.options)
    with session(options) as joined:
        own = dataclasses.replace(
            joined,
            batch_size=options.batch_size or _BATCH_SIZE,
            workers=options.default_workers if options.workers is None else options.workers,
        )
        if own.here.is_main:
            check_folder("--out", options.out)
        found = {job.name: _evaluate(job, options, more, own.here) for job in jobs}
        seen = _attempt("attention maps", lambda: _attention(options, own), own.here)
        confused = _attempt("neighbours", lambda: _confusion(options, own), own.here)
        path = options.out / "report.html"
        if own.here.is_main:
            # Here, so that no other evaluation waits for the library that draws.
            from training.evaluation import report_page

            report_page.write(own.model, found, seen, confused, path)
        results = {name: _plain(each) for name, each in found.items()}
        failed = [name for name, each in found.items() if each.error is not None]
        failed += [each.name for each in (seen, confused) if each.error is not None]
        tell(
            options,
            own,
            name="report",
            figures={"page": str(path), "evaluations": results, "failed": failed},
            protocol={"seed": options.seed, "k": K},
            data={name: given for name in _DATA if (given := _given(options, name)) is not None},
            table="\n".join([*(each.table for each in found.values() if each.table), str(path)]),
        )
    return 1 if failed else 0


def _chosen(options: argparse.Namespace) -> list[Job]:
    """The evaluations that were asked for and whose data is given.

    Raises:
        ConfigError: one that was asked for without its data; half of a pair; none at all.
    """
    chosen, partly = [], []
    for job in JOBS:
        given = [name for _, name in job.data if _given(options, name) is not None]
        if len(given) == len(job.data):
            chosen.append(job)
        elif given:
            partly.append((job, given))
    asked = options.evaluations or [job.evaluation for job in chosen]
    chosen = [job for job in chosen if job.evaluation in asked]
    for job, given in partly:
        missing = [f"--{name}" for _, name in job.data if name not in given]
        raise ConfigError(f"--{given[0]} is given without {', '.join(missing)}")
    for name in options.evaluations or ():
        if name not in {job.evaluation for job in chosen}:
            forms = [
                " and ".join(f"--{option}" for _, option in job.data)
                for job in JOBS
                if job.evaluation == name
            ]
            raise ConfigError(f"--evaluations {name}: needs {', or '.join(forms)}")
    if not chosen:
        raise ConfigError(f"no data is given: {', '.join(f'--{name}' for name in _DATA)}")
    return chosen


def _more(given: Sequence[str]) -> dict[str, list[str]]:
    """--options as lists of arguments, by evaluation or part of the page."""
    known = {name for job in JOBS for name in (job.evaluation, job.name)}
    found = {}
    for text in given:
        name, equals, rest = text.partition("=")
        if not equals or name not in known:
            raise ConfigError(
                f'--options {text!r}: must be NAME="--MORE", NAME one of {", ".join(sorted(known))}'
            )
        try:
            found[name] = shlex.split(rest)
        except ValueError as error:  # a quotation without its end
            raise ConfigError(f"--options {text!r}: {error}") from error
    return found


def _given(options: argparse.Namespace, name: str) -> Any:
    return getattr(options, name.replace("-", "_"))


def _evaluate(
    job: Job, options: argparse.Namespace, more: Mapping[str, list[str]], here: World
) -> Part[dict[str, Any]]:
    """Runs one command; its figures are what it gives when it is run alone."""
    # Here, since that module's list of evaluations holds this one.
    from training.evaluation.__main__ import run

    file = options.out / f"{job.name}.json"
    arguments = [job.evaluation, "--model", options.model, "--device", options.device]
    arguments += ["--precision", options.precision, "--save", str(file)]
    for option in ("batch_size", "workers"):
        if (value := getattr(options, option)) is not None:
            arguments += [f"--{option.replace('_', '-')}", str(value)]
    for option, name in job.data:
        given = _given(options, name)
        arguments += [option, *(given if isinstance(given, list) else [given])]
    if job.out:
        arguments += [job.out, str(options.out / job.name)]
    for name in dict.fromkeys((job.evaluation, job.name)):
        arguments += more.get(name, [])
    table = io.StringIO()

    def evaluate() -> dict[str, Any]:
        if here.is_main:
            file.unlink(missing_ok=True)  # of an earlier report
        try:
            with contextlib.redirect_stdout(table):
                run(arguments)
        except SystemExit as error:  # the parser has said why, on stderr
            raise ConfigError(f"this command line is refused: {shlex.join(arguments)}") from error
        if not here.is_main:  # it wrote nothing
            return {}
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found

    return _attempt(job.name, evaluate, here)._replace(table=table.getvalue().rstrip())


def _attempt(name: str, work: Callable[[], T], here: World) -> Part[T]:
    """What `work` gives, or why it gave nothing: said here and, for the page, in the answer.

    Several processes cannot go on: the others may be waiting for the one that failed.
    """
    try:
        with ending_workers():
            return Part(name, work())
    except (ArtifactError, ConfigError, DataError) as error:
        if here.size > 1:
            raise
        said = one_line(error)
    except Exception as error:
        if here.size > 1:
            raise
        traceback.print_exc()
        said = f"{type(error).__name__}: {error}"
    print(f"error: {name}: {said}", file=sys.stderr)
    return Part(name, None, said)


def _plain(part: Part[dict[str, Any]]) -> dict[str, Any]:
    if part.found is None:
        return {"error": part.error}
    return {key: value for key, value in part.found.items() if key not in _MEASURES}


def _attention(options: argparse.Namespace, own: Session) -> list[Attention] | None:
    name = next((name for name in _SOURCES if _given(options, name) is not None), None)
    if name is None or not own.artifact.architecture.has_attention or not own.here.is_main:
        return None
    given = _given(options, name)
    paths = given if isinstance(given, list) else [given]
    pictures = open_pictures([Path(path) / _SOURCES[name] for path in paths])
    return look_at(pictures, options.pictures, own)


def _confusion(options: argparse.Namespace, own: Session) -> Confusion | None:
    if options.train is None:
        return None
    train, val = open_train_and_val(options.train, options.val)
    return ask(train, val, own, queries=options.queries, seed=options.seed)
