"""The service beside its ceiling (one process without HTTP) and LitServe, in one run.

    python benchmarks/serving.py [--json]
    python benchmarks/serving.py --records 10000 --rounds 3 --seconds 2

Pictures are JPEGs of 500 x 375, JPEGs of 12 megapixels and PNGs of 2 megapixels, made from the
photographs in `--data`, or from synthetic ones where it is absent (`pictures_from`). Each request
sends other bytes with the same pixels, so that the service's cache, at its default size, never
answers.

- *The ceilings*: the same files decoded by a thread pool and embedded in batches by the service's
  own code, with the numbers of threads that a short trial of each kind found best. The plain one
  embeds what is ready, batch after batch, on all cores; *the* ceiling has a batch for each core, as
  the service has. They have twice as many pictures under way as the service has clients, so their
  batches are larger; `..., as many` have one for each client, with the settings that were best
  with two. The *textbook* one is what LitServe's process does, without LitServe.
- *The service*: `python -m service` with default settings, and 1, 4, 16 and 64 clients.
- *LitServe*: the same network, with Pillow and torchvision before it, batching on, and the settings
  that a short trial of each kind found best.

Clients are plain sockets in one thread of this process. They share the cores with what is
measured, and the ceiling has none. Rounds take turns, and what waits is stopped (SIGSTOP). Each
figure is the median of the rounds, each ratio the median of the rounds' ratios. Latencies take
turns in small lots. `attention_vs_embedding` and `search_minus_embedding_ms` are of 500 x 375
JPEGs and one client; `attention_vs_embedding_finest` is of maps at the model's `max_resolution`;
`int8_speedup` is the network's in batches of 16.
"""

import argparse
import json
import os
import sys
import tempfile
import urllib.request
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

# A script's own folder comes first in the path.
sys.path[0] = str(Path(__file__).parents[1])

from benchmarks.serving_clients import Load, Target, drive
from benchmarks.serving_pictures import make_pictures, without_end
from benchmarks.serving_processes import CeilingProcess, LitServe, Server, Service, fill_collection

CORES = len(os.sched_getaffinity(0))
Settings = dict[str, int]
COUNTS = {"jpeg": 48, "jpeg_12mp": 8, "png_2mp": 8}
FIRST = (
    "throughput_vs_ceiling_16",
    "throughput_vs_plain_ceiling_16",
    "throughput_vs_plain_ceiling_16_as_many",
    "throughput_vs_textbook_16",
    "throughput_vs_litserve_16",
    "throughput_vs_litserve_12mp",
    "latency_vs_ceiling_1",
    "latency_vs_textbook_1",
    "attention_vs_embedding",
    "attention_vs_embedding_finest",
    "search_minus_embedding_ms",
    "int8_speedup",
    "int8_mean_cosine",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=Path, default=Path("../shared/data/photos"))
    parser.add_argument("--model", default="default")
    parser.add_argument("--records", type=int, default=100_000, help="in the collection searched")
    parser.add_argument("--clients", type=int, default=16, help="where all three are compared")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--trial", type=float, default=3.0, help="seconds of each setting's trial")
    parser.add_argument("--lots", type=int, default=15, help="in which latencies take turns")
    parser.add_argument("--lot", type=int, default=20, help="requests in each of them")
    parser.add_argument("--pictures", type=int, default=500, help="for the cosine of int8")
    parser.add_argument("--skip", nargs="+", default=[], choices=["litserve"])
    parser.add_argument(
        "--quick", action="store_true", help="two pictures of a kind, no settings compared; a test"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        found = Benchmark(options, Path(made)).run()
    for name in FIRST:
        say(name, found[name])
    if options.json:
        print(json.dumps(found))


class Benchmark:
    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options = options
        self._lot_size = options.lot
        self._folder = folder
        counts = dict.fromkeys(COUNTS, 2) if options.quick else COUNTS
        pictures = make_pictures(options.data, counts)
        for kind, contents in pictures.items():
            (folder / "pictures" / kind).mkdir(parents=True)
            for i, content in enumerate(contents):
                (folder / "pictures" / kind / f"{i:03d}").write_bytes(content)
        self._pictures = pictures
        self._streams = {
            kind: without_end(contents, seed=i)
            for i, (kind, contents) in enumerate(pictures.items())
        }

    def run(self) -> dict[str, Any]:
        options = self._options
        found: dict[str, Any] = {
            "cores": CORES,
            "pictures_from": "photographs" if any(options.data.glob("*.jpg")) else "synthetic",
            "settings": {k: v for k, v in vars(options).items() if not isinstance(v, Path)},
        }
        with CeilingProcess(self._folder / "pictures", options.model) as ceiling:
            found["ceiling_settings"] = self._best_ceilings(ceiling)
            with Service(self._folder / "plain", options.model) as service:
                service.stop()
                rivals = self._best_rivals()
                try:
                    found["litserve_settings"] = {k: s.settings for k, s in rivals.items()}
                    found |= self._throughput(ceiling, service, rivals, found["ceiling_settings"])
                finally:
                    for rival in set(rivals.values()):
                        rival.__exit__(None, None, None)
                found |= self._latency(ceiling, service)
                with service.going():
                    found |= self._attention(service)
            found |= self._int8(ceiling)
        found |= self._search()
        return found

    def _best_ceilings(self, ceiling: CeilingProcess) -> dict[str, dict[str, Settings]]:
        """Kind -> name -> settings."""
        best: dict[str, dict[str, Settings]] = {}
        for kind in COUNTS:
            best[kind] = {}
            for name, candidates in self._ceilings().items():
                rates = [
                    ceiling.do("throughput", kind=kind, seconds=self._options.trial, **one)["per_s"]
                    for one in candidates
                ]
                say(f"{name}, {kind}", dict(zip(map(str, candidates), rates, strict=True)))
                fastest = candidates[rates.index(max(rates))]
                best[kind] |= {
                    name: fastest,
                    f"{name}, as many": {**fastest, "window": self._options.clients},
                }
        return best

    def _ceilings(self) -> dict[str, list[Settings]]:
        def candidates(
            compute_threads: int, *enough: int, textbook: bool = False
        ) -> list[Settings]:
            return [
                {
                    "textbook": textbook,
                    "decode_threads": decoding,
                    "compute_threads": compute_threads,
                    "enough": least,
                    "window": 2 * self._options.clients,
                }
                for decoding in sorted({1, CORES, 2 * CORES})
                for least in enough
            ][: 1 if self._options.quick else None]

        textbook = candidates(1, 1, textbook=True) + candidates(CORES, 8, textbook=True)
        return {
            "textbook": textbook,
            "plain ceiling": candidates(1, 1),
            "ceiling": candidates(CORES, 1, 8),
        }

    def _best_rivals(self) -> dict[str, LitServe]:
        """The fastest LitServe for each kind, started and stopped (SIGSTOP)."""
        if "litserve" in self._options.skip:
            return {}
        rates: dict[str, dict[int, float]] = {kind: {} for kind in COUNTS}
        candidates = LitServe.candidates(CORES, clients=self._options.clients)
        candidates = candidates[: 1 if self._options.quick else None]
        for i, settings in enumerate(candidates):
            with LitServe(settings, self._options.model) as server:
                for kind in COUNTS:
                    rates[kind][i] = self._load(
                        server, kind, self._options.clients, self._options.trial
                    ).per_s
        best = {kind: max(tried, key=lambda i: tried[i]) for kind, tried in rates.items()}
        for kind, tried in rates.items():
            say(f"LitServe, {kind}", {str(candidates[i]): rate for i, rate in tried.items()})
        started: dict[int, LitServe] = {}
        for i in set(best.values()):
            started[i] = LitServe(candidates[i], self._options.model).__enter__()
            started[i].stop()
        return {kind: started[i] for kind, i in best.items()}

    def _throughput(
        self,
        ceiling: CeilingProcess,
        service: Service,
        rivals: dict[str, LitServe],
        settings: dict[str, dict[str, Settings]],
    ) -> dict[str, Any]:
        seconds, rounds = self._options.seconds, self._options.rounds
        per_s: dict[str, dict[str, list[float]]] = {
            kind: {n: [] for n in (*settings[kind], "service", *(["litserve"] if rivals else []))}
            for kind in COUNTS
        }
        for kind, rates in per_s.items():
            for _ in range(rounds):
                for name, one in settings[kind].items():
                    done = ceiling.do("throughput", kind=kind, seconds=seconds, **one)
                    rates[name].append(done["per_s"])
                servers = {"service": service, **({"litserve": rivals[kind]} if rivals else {})}
                for name, server in servers.items():
                    rates[name].append(
                        self._load(server, kind, self._options.clients, seconds).per_s
                    )
            say(
                f"pictures/s, {kind}, {self._options.clients} clients",
                {n: median(r) for n, r in rates.items()},
            )
        by_clients = {}
        for clients in (1, 4, 16, 64):
            load = self._load(service, "jpeg", clients, seconds)
            p50, p99 = quantile(load.seconds_each, 0.5), quantile(load.seconds_each, 0.99)
            by_clients[str(clients)] = {
                "per_s": load.per_s,
                "p50_ms": 1e3 * p50,
                "p99_ms": 1e3 * p99,
            }
        say("the service by clients", by_clients)
        ratio = {
            kind: {
                name: ratio_of(rates["service"], theirs)
                for name, theirs in rates.items()
                if name != "service"
            }
            for kind, rates in per_s.items()
        }
        return {
            "per_s": {k: {n: median(r) for n, r in rates.items()} for k, rates in per_s.items()},
            "ratios": ratio,
            "by_clients": by_clients,
            "throughput_vs_ceiling_16": ratio["jpeg"]["ceiling"],
            "throughput_vs_plain_ceiling_16": ratio["jpeg"]["plain ceiling"],
            "throughput_vs_plain_ceiling_16_as_many": ratio["jpeg"]["plain ceiling, as many"],
            "throughput_vs_textbook_16": ratio["jpeg"]["textbook"],
            "throughput_vs_litserve_16": ratio["jpeg"].get("litserve"),
            "throughput_vs_litserve_12mp": ratio["jpeg_12mp"].get("litserve"),
        }

    def _latency(self, ceiling: CeilingProcess, service: Service) -> dict[str, Any]:
        found: dict[str, Any] = {}
        with service.going():
            for kind in COUNTS:

                def single(way: Settings, kind: str = kind) -> list[float]:
                    asked = {"kind": kind, "count": self._lot_size, **way}
                    seconds_each: list[float] = ceiling.do("single", **asked)["seconds_each"]
                    return seconds_each

                def fastest(textbook: bool) -> Settings:
                    ways = [
                        {"torch_threads": threads, "textbook": textbook}
                        for threads in sorted({1, CORES})
                    ]
                    return min(ways, key=lambda one: median(single(one)))

                ways, ours = [fastest(False), fastest(True)], []
                bare: list[list[float]] = [[], []]
                for _ in range(self._options.lots):
                    for way, took in zip(ways, bare, strict=True):
                        took += single(way)
                    ours += self._lot(service.target(), kind)
                found[kind] = {
                    "ceiling_threads": ways[0]["torch_threads"],
                    "service_ms": 1e3 * median(ours),
                    "ceiling_ms": 1e3 * median(bare[0]),
                    "textbook_ms": 1e3 * median(bare[1]),
                    "ratio": median(ours) / median(bare[0]),
                    "textbook_ratio": median(ours) / median(bare[1]),
                }
        say("one client", found)
        return {
            "latency": found,
            "latency_vs_ceiling_1": found["jpeg"]["ratio"],
            "latency_vs_textbook_1": found["jpeg"]["textbook_ratio"],
        }

    def _attention(self, service: Service) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://127.0.0.1:{service.port}/v1/models") as answer:
            finest = json.load(answer)["data"][0]["max_resolution"]
        path, lots = "/v1/attention", self._options.lots
        found = {kind: self._beside(service, path, kind, lots) for kind in COUNTS}
        found["finest"] = self._beside(service, f"{path}?resolution={finest}", "jpeg", lots)
        say("attention beside embeddings", found)
        ratio = {kind: one["other_ms"] / one["embedding_ms"] for kind, one in found.items()}
        return {
            "attention": found,
            "attention_vs_embedding": ratio["jpeg"],
            "attention_vs_embedding_finest": ratio["finest"],
        }

    def _search(self) -> dict[str, Any]:
        home = self._folder / "filled"
        fill_collection(home, self._options.model, self._options.records)
        with Service(home, self._options.model) as service:
            path = "/v1/collections/filled/search?k=10"
            found = self._beside(service, path, "jpeg", self._options.lots)
        say("search beside embeddings", found)
        return {
            "search": found,
            "search_minus_embedding_ms": found["other_ms"] - found["embedding_ms"],
        }

    def _int8(self, ceiling: CeilingProcess) -> dict[str, Any]:
        files = sorted(self._options.data.glob("*.jpg")) or sorted(
            (self._folder / "pictures" / "jpeg").iterdir()
        )
        names = [str(path) for path in files[: self._options.pictures]]
        found = {
            str(batch): ceiling.do(
                "precision",
                precision="int8",
                files=names,
                batch=batch,
                rounds=5 * self._options.lots,
                torch_threads=CORES,
            )
            for batch in (1, 16)
        }
        say("int8", found)
        return {
            "int8": found,
            "int8_speedup": found["16"]["speedup"],
            "int8_mean_cosine": found["16"]["mean_cosine"],
        }

    def _load(self, server: Server, kind: str, clients: int, seconds: float) -> Load:
        with server.going():
            return drive(server.target(), self._streams[kind], clients=clients, seconds=seconds)

    def _beside(self, service: Service, path: str, kind: str, lots: int) -> dict[str, float]:
        """p50 of another route and of embeddings, asked in turns."""
        embedding: list[float] = []
        other: list[float] = []
        for _ in range(lots):
            embedding += self._lot(service.target(), kind)
            other += self._lot(service.target(path), kind)
        return {"embedding_ms": 1e3 * median(embedding), "other_ms": 1e3 * median(other)}

    def _lot(self, target: Target, kind: str) -> list[float]:
        load = drive(target, islice(self._streams[kind], self._lot_size), clients=1)
        return load.seconds_each


def ratio_of(ours: list[float], theirs: list[float]) -> float:
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def say(what: str, found: Any) -> None:
    print(f"{what}: {json.dumps(found)}", flush=True)


if __name__ == "__main__":
    main()
