"""The service under more than it can do: what is refused, how, and what becomes of the rest.

    python benchmarks/overload.py [--seconds 120] [--times 4] [--json]

A service in a process of its own, on this machine. Its capacity is measured by 16 clients that wait
for their answers; then requests come at `--times` that rate, whether answered or not, each on a
connection of its own and with a picture of its own; then one client alone, to see it recover.
"""

import argparse
import asyncio
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import numpy as np

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "pictures" / "chelsea.jpg"
CLIENTS = 16
PATIENCE_S = 120.0


@dataclass
class Answers:
    """What came back: by status, and the accepted ones' latencies in seconds."""

    statuses: Counter[str] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    without_retry_after: int = 0

    def quantile(self, share: float) -> float:
        return float(np.quantile(self.latencies, share)) if self.latencies else math.nan


class Load:
    """Sends pictures, no two alike, so that no cache answers."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._picture = PICTURE.read_bytes()
        self._numbers = count()

    async def send(self, answers: Answers) -> None:
        began = time.perf_counter()
        try:
            status, head = await asyncio.wait_for(self._exchange(), PATIENCE_S)
        except (OSError, EOFError, TimeoutError, asyncio.IncompleteReadError) as error:
            answers.statuses[type(error).__name__] += 1
            return
        answers.statuses[status] += 1
        if status == "200":
            answers.latencies.append(time.perf_counter() - began)
        elif b"\r\nretry-after: " not in head.lower():
            answers.without_retry_after += 1

    async def _exchange(self) -> tuple[str, bytes]:
        # A comment makes each JPEG another file and leaves its pixels as they are.
        comment = b"\xff\xfe\x00\x0a" + next(self._numbers).to_bytes(8, "big")
        content = self._picture[:2] + comment + self._picture[2:]
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            writer.write(
                b"POST /v1/embeddings?encoding_format=base64 HTTP/1.1\r\nHost: a\r\n"
                b"Content-Type: image/jpeg\r\nConnection: close\r\n"
                b"Content-Length: %d\r\n\r\n" % len(content)
            )
            writer.write(content)
            await writer.drain()
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.read()
        finally:
            writer.close()
        return head.split(b" ", 2)[1].decode(), head


async def closed_loop(load: Load, seconds: float, clients: int) -> Answers:
    """Clients that send when they have their answer."""
    answers, end = Answers(), time.perf_counter() + seconds

    async def client() -> None:
        while time.perf_counter() < end:
            await load.send(answers)

    await asyncio.gather(*(client() for _ in range(clients)))
    return answers


async def open_loop(load: Load, seconds: float, rate: float) -> tuple[Answers, float]:
    """Requests at a rate, come what may; the answers, and the rate that was kept up."""
    answers, began, sent = Answers(), time.perf_counter(), 0
    running: set[asyncio.Task[None]] = set()
    while (passed := time.perf_counter() - began) < seconds:
        while sent < passed * rate:
            task = asyncio.create_task(load.send(answers))
            running.add(task)
            task.add_done_callback(running.discard)
            sent += 1
        await asyncio.sleep(0.002)
    offered = sent / (time.perf_counter() - began)
    if running:
        await asyncio.wait(running)
    return answers, offered


@contextmanager
def service(options: argparse.Namespace, folder: Path) -> Iterator[tuple[int, int]]:
    """Port and process id of a service that is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "MODEL": options.model,
        "DEADLINE_SECONDS": str(options.deadline),
        "TORCH_THREADS": str(options.threads),
        "DATA_DIR": str(folder / "data"),
        "PORT": str(port),
    }
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DINOSCOPE_")}
    environment |= {f"DINOSCOPE_{name}": value for name, value in settings.items()}
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "service"], cwd=ROOT, env=environment, stderr=log
        )
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not _is_ready(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no service:\n{(folder / 'log.txt').read_text()[-2000:]}")
            time.sleep(0.1)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait(60)


def _is_ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
    except httpx.TransportError:
        return False


def resident_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = [one for one in status.splitlines() if one.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


async def watch_memory(pid: int, seen: list[float]) -> None:
    while True:
        seen.append(resident_mib(pid))
        await asyncio.sleep(0.2)


async def measure(port: int, pid: int, options: argparse.Namespace) -> dict[str, Any]:
    load = Load(port)
    await closed_loop(load, options.warm_up, CLIENTS)
    calm = await closed_loop(load, options.warm_up, CLIENTS)
    if set(calm.statuses) != {"200"}:
        raise RuntimeError(f"{CLIENTS} clients are too many already: {calm.statuses}")
    capacity = calm.statuses["200"] / options.warm_up
    alone = await closed_loop(load, min(5.0, options.warm_up), 1)
    before = resident_mib(pid)
    memory: list[float] = []
    watching = asyncio.create_task(watch_memory(pid, memory))
    answers, offered = await open_loop(load, options.seconds, options.times * capacity)
    watching.cancel()
    began = time.perf_counter()
    after = Answers()
    while not after.latencies:
        await load.send(after)
    recovery_s = time.perf_counter() - began
    again = await closed_loop(load, min(5.0, options.warm_up), 1)
    refused = sum(n for status, n in answers.statuses.items() if status != "200")
    return {
        "capacity_per_s": capacity,
        "offered_per_s": offered,
        "offered_vs_capacity": offered / capacity,
        "accepted_vs_capacity": answers.statuses["200"] / options.seconds / capacity,
        "statuses": dict(answers.statuses),
        "refused": refused,
        "refused_without_retry_after": answers.without_retry_after,
        "accepted_p50_s": answers.quantile(0.5),
        "accepted_p99_s": answers.quantile(0.99),
        "accepted_max_s": answers.quantile(1.0),
        "deadline_s": options.deadline,
        "resident_before_mib": before,
        "resident_peak_mib": max(memory),
        "growth_mib": max(memory) - before,
        "growth_bound_mib": options.bound_mib,
        "first_answer_after_s": recovery_s,
        "alone_before_p50_s": alone.quantile(0.5),
        "alone_after_p50_s": again.quantile(0.5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="default")
    parser.add_argument("--seconds", type=float, default=120.0, help="of overload")
    parser.add_argument("--warm-up", type=float, default=10.0, help="seconds of each calm phase")
    parser.add_argument("--times", type=float, default=4.0, help="the capacity")
    parser.add_argument("--deadline", type=float, default=5.0, help="DINOSCOPE_DEADLINE_SECONDS")
    parser.add_argument("--threads", type=int, default=0, help="DINOSCOPE_TORCH_THREADS")
    parser.add_argument("--bound-mib", type=float, default=256.0, help="memory may grow by so much")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, service(options, Path(folder)) as (port, pid):
        found = asyncio.run(measure(port, pid, options))
    for name, value in found.items():
        print(f"{name:30}{value:.3f}" if isinstance(value, float) else f"{name:30}{value}")
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
