"""Children that write growing generations of a cache, each killed at a random moment.

    python -m tests.index.killed_cache_writer FOLDER KILLS

Prints one line a kill: the generation found by `read_cache`, and the last one acknowledged. A
program of its own because it forks, which a process with threads should not.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np

from index.cache import read_cache, write_cache

DESCRIBED = {"collection": "2c0f", "metric": "cosine"}


def content(generation: int) -> bytes:
    return np.random.default_rng(generation).bytes(30_000 + generation % 7)


def write(folder: Path, generation: int) -> None:
    write_cache(
        folder,
        "cls",
        save=lambda path: path.write_bytes(content(generation)) and None,
        numbers=np.arange(generation, generation + 50),
        kind="hnsw",
        effort=generation,
        described=DESCRIBED,
        generation=generation,
    )


def write_until_killed(folder: Path, generation: int, acknowledge: int) -> None:
    while True:
        generation += 1
        write(folder, generation)
        os.pwrite(acknowledge, generation.to_bytes(8, "little"), 0)


def main() -> None:
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    acknowledged_file = os.open(folder / "acknowledged", os.O_RDWR | os.O_CREAT)
    chance = random.Random(5)
    generation = 0
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            write_until_killed(folder, generation, acknowledged_file)
        time.sleep(chance.uniform(0, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        cached = read_cache(folder, "cls", described=DESCRIBED)
        acknowledged = int.from_bytes(os.pread(acknowledged_file, 8, 0), "little")
        if cached is not None:
            generation = cached.generation
            assert cached.path.read_bytes() == content(generation)
            assert cached.numbers.tolist() == list(range(generation, generation + 50))
            assert cached.effort == generation
        print(generation, acknowledged)


if __name__ == "__main__":
    main()
