"""python -m tests.service.fuzz --pictures 20000 --seed 1 [--json]

Sends mutated and malformed pictures of every allowed format to a service in a process of its own,
with the model of the repository, over several connections. It must answer each with 200, 400, 413
or 415 in the one shape of errors, and keep its memory: after a warm-up it may not grow beyond a
bound.
What fails is written into a folder, picture by picture. Exit status 1: something failed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from tests.service.mutations import mutate
from tests.service.pictures import png
from tests.service.seed_pictures import seeds

REPOSITORY = Path(__file__).parents[2]
ROUTES = ("embeddings", "attention", "uploads")
EXPECTED = {200, 400, 413, 415}
MIB = 2**20
BOUND_MIB = 128
PATIENCE_S = 120.0
SETTLES_S = 6.0
_SOUND = png(1, (64, 48))


@dataclass
class Report:
    """What became of a run.

    Attributes:
        counts: "status code" of an answer, or of the picture's part of it -> how many.
        slowest: seconds, and which picture.
        rss_mib: resident memory after the warm-up and at the end, settled, and the largest ever.
    """

    pictures: int
    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    by_route: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")
    seconds: float = 0.0
    rss_mib: dict[str, float] = field(default_factory=dict)
    bound_mib: float = BOUND_MIB

    @property
    def growth_mib(self) -> float:
        return self.rss_mib["end"] - self.rss_mib["warm"]

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "growth_mib": self.growth_mib}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Picture `number` of a run; the run's seed and the number alone decide what it is."""

    number: int
    content: bytes
    story: str

    @property
    def route(self) -> str:
        return ROUTES[self.number % len(ROUTES)]


def run(
    *, pictures: int, seed: int, connections: int, whole: int, keep: Path, bound_mib: float
) -> Report:
    """Starts a service, sends everything, stops it.

    Args:
        whole: photographs that every kind of file is made of.
        keep: folder for pictures that fail; made when one does.
    """
    report = Report(pictures=pictures, seed=seed, bound_mib=bound_mib)
    named = seeds(whole)
    lock = threading.Lock()
    warm_up = max(1, pictures // 5)
    with service() as (process, client), ThreadPoolExecutor(connections) as pool:
        before = client.post("/v1/embeddings", files={"image": _SOUND}).json()

        def send(number: int) -> None:
            picture = make(named, seed, number)
            start = time.monotonic()
            try:
                told, complaint = _send(client, picture)
            except (httpx.TransportError, ValueError, KeyError) as error:
                told, complaint = f"no answer: {type(error).__name__}", repr(error)
            took = time.monotonic() - start
            with lock:
                report.counts[told] += 1
                report.by_route[picture.route] += 1
                report.slowest = max(report.slowest, (took, f"{picture.route}: {picture.story}"))
                if complaint:
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / f"{seed}-{number}").write_bytes(picture.content)
                    report.failures.append(f"{picture.route}: {picture.story}: {complaint}")

        start = time.monotonic()
        list(pool.map(send, range(warm_up)))
        report.rss_mib["warm"] = _settled(process)
        list(pool.map(send, range(warm_up, pictures)))
        report.seconds = time.monotonic() - start - SETTLES_S
        report.rss_mib["end"] = _settled(process)
        report.rss_mib["peak"] = _memory(process, "VmHWM")
        if client.post("/v1/embeddings", files={"image": _SOUND}).json() != before:
            report.failures.append("a sound picture no longer has the embedding that it had")
        if client.get("/readyz").status_code != 200:
            report.failures.append("the service is no longer ready")
    if process.returncode != 0:
        report.failures.append(f"the service ended with status {process.returncode}")
    if report.growth_mib > bound_mib:
        report.failures.append(f"memory grew by {report.growth_mib:.0f} MiB")
    return report


def make(named: Sequence[tuple[str, bytes]], seed: int, number: int) -> Picture:
    """Picture `number`, the same each time."""
    random = np.random.default_rng([seed, number])
    name, content = named[random.integers(len(named))]
    others = [named[i][1] for i in random.integers(0, len(named), 3)]
    others += [other for kind, other in named if kind.split()[0] == name.split()[0]][:3]
    damaged, mutations = mutate(random, content, others)
    return Picture(number=number, content=damaged, story=f"{number}, {name}, {'+'.join(mutations)}")


@contextmanager
def service() -> Iterator[tuple["subprocess.Popen[bytes]", httpx.Client]]:
    """`python -m service` on a free port, in a folder that is gone afterwards."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("DINOSCOPE_")}
    with tempfile.TemporaryDirectory() as folder:
        given = {
            "DINOSCOPE_DATA_DIR": f"{folder}/data",
            "DINOSCOPE_PORT": "0",
        }
        log = Path(folder) / "log"
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "service"],
                cwd=folder,
                env={**clean, **given, "PYTHONPATH": str(REPOSITORY)},
                stderr=stderr,
            )
        try:
            with httpx.Client(base_url=_address(process, log), timeout=PATIENCE_S) as client:
                while not client.get("/readyz").is_success:
                    time.sleep(0.1)
                client.put("/v1/collections/fuzz").raise_for_status()
                yield process, client
        finally:
            process.terminate()
            process.wait(PATIENCE_S)
            errors = [line for line in log.read_text().splitlines() if " INFO " not in line]
            print(*errors[-40:], sep="\n", end="\n" if errors else "", file=sys.stderr)


def _address(process: "subprocess.Popen[bytes]", log: Path) -> str:
    deadline = time.monotonic() + PATIENCE_S
    while process.poll() is None and time.monotonic() < deadline:
        _, found, rest = log.read_text().partition("listening on http://")
        if found:
            return "http://" + rest.partition('"')[0]
        time.sleep(0.1)
    raise RuntimeError(f"the service did not start:\n{log.read_text()}")


def _settled(process: "subprocess.Popen[bytes]") -> float:
    """Resident memory in MiB once the service, which does so every 5 s, gave back what it freed."""
    end, least = time.monotonic() + SETTLES_S, _memory(process, "VmRSS")
    while time.monotonic() < end:
        time.sleep(0.2)
        least = min(least, _memory(process, "VmRSS"))
    return least


def _send(client: httpx.Client, picture: Picture) -> tuple[str, str]:
    """What became of it, and what is wrong with that, if anything is."""
    raw = {"content": picture.content, "headers": {"Content-Type": "application/octet-stream"}}
    if picture.route == "uploads":
        # A sound picture beside it, which must not suffer. Few ids, so that the index stays small.
        files = [("image", ("sound", _SOUND)), ("image", ("damaged", picture.content))]
        ids = {"id": ["sound", f"damaged {picture.number % 50}"]}
        answer = client.post("/v1/collections/fuzz/images", files=files, data=ids)
    else:
        answer = client.post(f"/v1/{picture.route}", **raw)
    if answer.status_code not in EXPECTED:
        return f"{answer.status_code}", answer.text[:500]
    if answer.status_code != 200:
        error = answer.json()["error"]
        named = error["param"] == "body" and error["message"].startswith("body ")
        return f"{answer.status_code} {error['code']}", "" if named else answer.text[:500]
    if picture.route == "attention":
        return "200", "" if answer.content.startswith(b"\x89PNG") else "no PNG"
    if picture.route == "embeddings":
        norm = float(np.linalg.norm(answer.json()["data"][0]["embedding"]))
        return "200", "" if abs(norm - 1.0) < 1e-3 else f"length {norm}"
    sound, damaged = answer.json()["images"]
    wrong = "" if sound["outcome"] in ("created", "unchanged") else answer.text[:500]
    if damaged["outcome"] == "failed":
        return f"200, failed: {damaged['error']['code']}", wrong
    return "200", wrong


def _memory(process: "subprocess.Popen[bytes]", name: str) -> float:
    """VmRSS or VmHWM in MiB; not a number where there is no /proc."""
    status = Path(f"/proc/{process.pid}/status")
    if not status.is_file():
        return float("nan")
    (line,) = (line for line in status.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024 / MIB


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--whole", type=int, default=6, help="photographs to make files of")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"))
    parser.add_argument("--bound-mib", type=float, default=BOUND_MIB)
    parser.add_argument("--json", action="store_true", help="one object in the last line")
    given = vars(parser.parse_args(arguments))
    as_json = given.pop("json")
    report = run(**given)
    routes = ", ".join(f"{n} to {route}" for route, n in sorted(report.by_route.items()))
    print(f"{report.pictures} pictures, seed {report.seed}, {report.seconds:.0f} s: {routes}")
    for told, number in report.counts.most_common():
        print(f"{number:8}  {told}")
    print(f"slowest {report.slowest[0]:.2f} s ({report.slowest[1]})")
    print(
        "resident memory {warm:.0f} MiB after the warm-up, {end:.0f} at the end, "
        "at most {peak:.0f}".format(**report.rss_mib)
    )
    print(f"grown by {report.growth_mib:.0f} MiB, bound {report.bound_mib:.0f}")
    for failure in report.failures:
        print(f"FAILED {failure}")
    if as_json:
        print(json.dumps(report.to_json()))
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
