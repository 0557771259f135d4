"""Several evaluations in one process of `torchrun -m`, each argument a command line in JSON."""

import json
import sys

from training.distributed import world
from training.evaluation.__main__ import main

if __name__ == "__main__":
    with world("cpu"):
        sys.exit(max(main(json.loads(line)) for line in sys.argv[1:]))
