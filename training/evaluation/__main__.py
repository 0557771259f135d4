"""python -m training.evaluation NAME --model M ... [--json]."""

import argparse
import sys
from collections.abc import Sequence

from tqdm import tqdm

from backbone.artifact import ArtifactError
from training.config import ConfigError
from training.data import one_line
from training.evaluation import (
    attention_jaccard,
    attention_video,
    copy_detection,
    finetune,
    knn,
    linear,
    report,
    retrieval,
    video_segmentation,
)
from training.sources import DataError
from training.workers import ending_workers

EVALUATIONS = (
    knn,
    linear,
    retrieval,
    copy_detection,
    video_segmentation,
    attention_jaccard,
    finetune,
    attention_video,
    report,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 2 for what cannot be used, or written."""
    try:
        return run(arguments)
    except (ArtifactError, ConfigError, DataError, OSError) as error:
        # On a line of its own, where a bar still stands.
        tqdm.write(f"error: {one_line(error)}", file=sys.stderr)
        return 2


def run(arguments: Sequence[str] | None = None) -> int:
    """The command line for callers that tell of errors themselves; returns the exit status.

    Raises:
        ArtifactError: a model that cannot be used.
        ConfigError: options that make no sense together.
        DataError: data that cannot be used.
        OSError: a file that cannot be read or written.
    """
    parser = argparse.ArgumentParser(prog="python -m training.evaluation", description=__doc__)
    names = parser.add_subparsers(required=True, metavar="NAME")
    for evaluation in EVALUATIONS:
        evaluation.add_command(names)
    options = parser.parse_args(arguments)
    with ending_workers():
        return options.run(options) or 0


if __name__ == "__main__":
    sys.exit(main())
