"""python -m training.evaluation NAME --model M ... [--json]."""

import argparse
import sys
from collections.abc import Sequence

from backbone.artifact import ArtifactError
from training.config import ConfigError
from training.data import one_line
from training.evaluation import copy_detection, knn, retrieval
from training.sources import DataError

EVALUATIONS = (knn, retrieval, copy_detection)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 2 for a model or data that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m training.evaluation", description=__doc__)
    names = parser.add_subparsers(required=True, metavar="NAME")
    for evaluation in EVALUATIONS:
        evaluation.add_command(names)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ArtifactError, ConfigError, DataError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
