"""Kill a process that writes to a collection, again and again, and look at what is left.

    python -m tests.index.torture [--kills 300] [--seed N] [--folder DIR] [--json]

The status is 1 when anything that was acknowledged is gone, or anything else is not as it must be:
then the folder stays, and the seed is told. The moments of the kills depend on the machine's speed,
so a seed brings back the operations but not for certain the fault.

Everything runs in forks of this process, which for that has one thread alone.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from tests.index.torture.killing import Torture

_THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def main() -> int:
    options = _parser().parse_args()
    if not _THREADS.keys() <= os.environ.keys():  # read when libraries are loaded, so before that
        os.execve(sys.executable, sys.orig_argv, dict(os.environ) | _THREADS)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="torture-"))
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        sys.exit(f"{folder} is not empty")
    seed = int.from_bytes(os.urandom(4)) if options.seed is None else options.seed
    torture = Torture(folder / "collections", seed=seed, records=options.records)
    tqdm.monitor_interval = 0  # no thread
    bar = tqdm(range(options.kills), unit="kill", dynamic_ncols=True, disable=None)
    with suppress(KeyboardInterrupt), bar:  # what is known by then is told
        for _ in bar:
            torture.kill_once()
            bar.set_postfix(writes=torture.writes, faults=len(torture.faults))
            if torture.faults:
                break
    told = torture.told() | {"seed": seed}
    if options.json:
        print(json.dumps(told))
    else:
        width = max(map(len, told))
        for name, value in told.items():
            print(f"{name.replace('_', ' '):{width}}  {value}")
    if torture.faults:
        print(
            f"seed {seed}; the folder is kept: {folder}", *torture.faults, sep="\n", file=sys.stderr
        )
        return 1
    if options.folder is None:
        shutil.rmtree(folder)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m tests.index.torture", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, help="of all that is drawn; another each time without")
    parser.add_argument("--folder", type=Path, help="an empty one, which is kept")
    parser.add_argument("--records", type=int, default=4800, help="that the collection has, about")
    parser.add_argument("--json", action="store_true", help="one object in place of a table")
    return parser


if __name__ == "__main__":
    sys.exit(main())
