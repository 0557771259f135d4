"""What one process does with pictures without HTTP: `serving.py` asks it over standard input.

Each line is a JSON object whose `do` names a method of `Ceiling`, and is answered by a line.
Decoding, preprocessing and the network are the service's own, so that what lies between is all that
HTTP, queues and threads cost.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np

# A script's own folder comes first in the path.
sys.path[0] = str(Path(__file__).parents[1])

from backbone.pretrained import load_model
from benchmarks.serving_textbook import Textbook
from service.encoder import Array, TorchEncoder
from service.images import Limits, decode_reduced
from service.precision import Precision
from service.torch_threads import torch_threads

CORES = len(os.sched_getaffinity(0))
LIMITS = Limits(max_bytes=2**30, max_pixels=10**8)


class Ceiling:
    """Args: folder: holds a folder of picture files for each kind."""

    def __init__(self, folder: Path, model: str) -> None:
        self._folder = folder
        self._model = load_model(model)
        self._preparing = TorchEncoder(self._model)
        self._encoders: dict[tuple[Precision, int], TorchEncoder] = {}
        self._textbook = Textbook(model)

    def encoder(self, precision: Precision, threads: int) -> TorchEncoder:
        key = precision, threads
        if key not in self._encoders:
            self._encoders[key] = TorchEncoder(self._model, precision=precision, threads=threads)
        return self._encoders[key]

    def files(self, kind: str) -> list[Path]:
        return sorted((self._folder / kind).iterdir())

    def throughput(
        self,
        *,
        kind: str,
        seconds: float,
        decode_threads: int,
        compute_threads: int,
        enough: int,
        window: int,
        batch: int = 16,
        textbook: bool = False,
    ) -> dict[str, Any]:
        """Pictures a second: a pool decodes, another one embeds what is ready, in batches.

        `window` pictures are under way at once. A batch has `enough` of them, or all there are. One
        thread that computes has all cores for each batch; several have their share. `textbook` is
        without the service's own decoding, preprocessing and network.
        """
        files, prepare, embed = self.files(kind), *self._ways(textbook, CORES, compute_threads)
        with (
            ThreadPoolExecutor(decode_threads) as decoding,
            ThreadPoolExecutor(compute_threads) as computing,
        ):
            done, number = 0, 0
            decoded: set[Future[Any]] = set()
            batches: set[Future[Sequence[Any]]] = set()
            ready: list[Any] = []
            start = time.perf_counter()
            while (now := time.perf_counter()) < start + seconds or decoded or batches or ready:
                while now < start + seconds and number - done < window:
                    decoded.add(decoding.submit(prepare, files[number % len(files)]))
                    number += 1
                while ready and len(batches) < compute_threads:
                    if len(ready) < enough and decoded:
                        break
                    share = -(-len(ready) // (compute_threads - len(batches)))
                    some, ready = ready[: min(share, batch)], ready[min(share, batch) :]
                    batches.add(computing.submit(embed, some))
                finished = wait([*decoded, *batches], return_when=FIRST_COMPLETED).done
                ready += [one.result() for one in decoded & finished]
                done += sum(len(one.result()) for one in batches & finished)
                decoded, batches = decoded - finished, batches - finished
            return {"per_s": done / (time.perf_counter() - start)}

    def _ways(
        self, textbook: bool, threads: int, at_once: int = 1
    ) -> tuple[Callable[[Path], Any], Callable[[list[Any]], Sequence[Any]]]:
        """How a file is decoded, and how a batch is embedded."""
        encoder = self.encoder("fp32", threads)

        def embed(inputs: list[Any]) -> Sequence[Any]:
            with torch_threads(max(1, threads // at_once)):
                return self._textbook.embed(inputs)

        if textbook:
            return lambda file: self._textbook.prepare(file.read_bytes()), embed
        return self.prepare, lambda inputs: encoder.run("cls", inputs, at_once=at_once)

    def single(
        self, *, kind: str, count: int, torch_threads: int, textbook: bool = False
    ) -> dict[str, Any]:
        """Seconds of each of `count` pictures, one after another: read, decode, embed."""
        files, prepare, embed = self.files(kind), *self._ways(textbook, torch_threads)
        seconds_each = []
        for i in range(count):
            before = time.perf_counter()
            embed([prepare(files[i % len(files)])])
            seconds_each.append(time.perf_counter() - before)
        return {"seconds_each": seconds_each}

    def precision(
        self, *, precision: Precision, files: list[str], batch: int, rounds: int, torch_threads: int
    ) -> dict[str, Any]:
        """The network's speed against fp32 on equal batches, and the cosine on whole pictures.

        A batch of several has one core, as in the service under load.
        """
        plain, other = (self.encoder(one, torch_threads) for one in ("fp32", precision))
        at_once = 1 if batch == 1 else torch_threads
        inputs = [self.prepare(Path(name)) for name in files]
        cosines: list[float] = []
        for start in range(0, len(inputs), batch):
            some = inputs[start : start + batch]
            for one, two in zip(plain.run("cls", some), other.run("cls", some), strict=True):
                cosines.append(float(one @ two / np.linalg.norm(one) / np.linalg.norm(two)))
        ratios = []
        some = (inputs * batch)[:batch]
        for _ in range(rounds):
            took = []
            for encoder in (plain, other):
                before = time.perf_counter()
                encoder.run("cls", some, at_once=at_once)
                took.append(time.perf_counter() - before)
            ratios.append(took[0] / took[1])
        return {
            "speedup": float(np.median(ratios)),
            "mean_cosine": float(np.mean(cosines)),
            "min_cosine": min(cosines),
            "pictures": len(inputs),
        }

    def prepare(self, file: Path) -> Array:
        decoded = decode_reduced(
            file.read_bytes(),
            LIMITS,
            param=file.name,
            mode=self._preparing.info.picture_mode,
            needed=lambda size: [self._preparing.needed("cls", size)],
        )
        return self._preparing.prepare("cls", decoded.picture, extent=decoded.extent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="default")
    options = parser.parse_args()
    ceiling = Ceiling(options.folder, options.model)
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(getattr(ceiling, command.pop("do"))(**command)), flush=True)


if __name__ == "__main__":
    main()
