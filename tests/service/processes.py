"""A service in a process of its own, with an encoder whose pace and failures files decide."""

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx

LONGEST_S = 120.0  # for anything that is bound to come, on a machine that is busy


class Service:
    """A running process: what it answers and what it logged."""

    def __init__(self, process: BaseProcess, folder: Path) -> None:
        self.process = process
        self.folder = folder
        self._log = folder / "log.txt"

    @property
    def lines(self) -> list[dict[str, Any]]:
        """What was logged; each line has to be a JSON object."""
        return [json.loads(line) for line in self._log.read_text().splitlines()]

    @property
    def port(self) -> int:
        """The one that it took; waits until it listens."""
        return int(str(self.logged("listening on")["message"]).rpartition(":")[2])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def logged(self, start: str) -> dict[str, Any]:
        """The first line whose message starts so; waits for it."""

        def found() -> dict[str, Any] | None:
            whole = self._log.read_text().rpartition("\n")[0].splitlines()
            lines = (json.loads(line) for line in whole)
            return next((one for one in lines if one["message"].startswith(start)), None)

        return until(found, self)

    def told(self, start: str) -> dict[str, Any]:
        """The first line whose message starts so, of a process that has ended."""
        return next(one for one in self.lines if one["message"].startswith(start))

    def requests(self) -> list[dict[str, Any]]:
        """The lines that tell of requests."""
        return [one for one in self.lines if one["logger"] == "service.requests"]

    def set(self, **how: float | str) -> None:
        """Tells the slow encoder how to behave from its next batch on; see `slow_service`."""
        written = self.folder / "how.tmp"
        written.write_text(json.dumps(how))
        written.replace(self.folder / "how.json")

    def metric(self, name: str, **labels: str) -> float:
        """A sample of /metrics; 0 where there is none."""
        for line in httpx.get(f"{self.url}/metrics").text.splitlines():
            sample, _, value = line.rpartition(" ")
            if sample.partition("{")[0] == name and all(
                f'{key}="{label}"' in sample for key, label in labels.items()
            ):
                return float(value)
        return 0.0

    def ready(self) -> "Service":
        """Waits until it is."""
        until(lambda: httpx.get(f"{self.url}/readyz").status_code == 200 or None, self)
        return self

    def terminate(self) -> None:
        os.kill(self.process.pid or 0, signal.SIGTERM)

    def wait(self) -> int | None:
        """Its exit status."""
        self.process.join(LONGEST_S)
        return self.process.exitcode


def until(found: Callable[[], Any], service: Service | None = None) -> Any:
    """The first value of `found` that is not None."""
    deadline = time.monotonic() + LONGEST_S
    while time.monotonic() < deadline:
        value = found()
        if value is not None:
            return value
        if service is not None and service.process.exitcode is not None:
            raise AssertionError(f"it ended with {service.process.exitcode}: {service.lines}")
        time.sleep(0.01)
    raise AssertionError("it did not come")


@contextmanager
def running(folder: Path, **settings: Any) -> Iterator[Service]:
    """The slow service with these settings and its data in `folder`, killed in the end."""
    given = {
        "port": 0,
        "data_dir": folder / "data",
        "torch_threads": 1,
        "log_level": "debug",
        **settings,
    }
    environment = {f"DINOSCOPE_{name.upper()}": str(value) for name, value in given.items()}
    # A process that has imported everything forks them: importing torch takes seconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.service.slow_service"])
    (folder / "log.txt").write_bytes(b"")
    process = context.Process(target=serve, args=(folder, environment))
    process.start()
    try:
        yield Service(process, folder)
    finally:
        process.kill()
        process.join()
        process.close()


def serve(folder: Path, environment: dict[str, str]) -> None:
    """Runs in the process."""
    from tests.service import slow_service

    for name in [name for name in os.environ if name.startswith("DINOSCOPE_")]:
        del os.environ[name]
    os.environ.update(environment, SLOW_SERVICE=str(folder / "how.json"))
    os.chdir(folder)
    with (folder / "log.txt").open("wb") as log:
        os.dup2(log.fileno(), 2)
    sys.argv = ["service"]
    sys.exit(slow_service.run())
