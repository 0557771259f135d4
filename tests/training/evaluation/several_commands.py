"""Several evaluations in one process of `torchrun -m`, each argument a command line in JSON."""

import json
import sys
from contextlib import nullcontext

from training.distributed import world
from training.evaluation import command
from training.evaluation.__main__ import main

if __name__ == "__main__":
    with world("cpu") as here:
        # Processes cannot join a second time, so that all commands share one group.
        command.world = lambda device: nullcontext(here)
        status = max(main(json.loads(line)) for line in sys.argv[1:])
    sys.exit(status)
