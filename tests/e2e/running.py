"""A service in a process of its own."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]


@contextmanager
def running_service(folder: Path, **settings: str) -> Iterator[str]:
    """The address of a service on a free port of this machine, ready; it keeps all in `folder`.

    Args:
        settings: as in `service.settings`; the environment's own are left out.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = {"port": str(port), "device": "cpu", "torch_threads": "1", **settings}
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("DINOSCOPE_")},
        **{f"DINOSCOPE_{name.upper()}": value for name, value in given.items()},
        "DINOSCOPE_DATA_DIR": str(folder / "data"),
    }
    url, log = f"http://127.0.0.1:{port}", folder / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "service"],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait_until_ready(process, url, log)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=60)


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/readyz").is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    pytest.fail(f"the service did not become ready:\n{log.read_text()}")
