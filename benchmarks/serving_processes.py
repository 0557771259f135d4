"""The processes that `serving.py` compares: started, paused while others run, and ended."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np

from backbone.pretrained import load_model
from benchmarks.serving_clients import Target
from index.collection import NewRecord
from index.collection_set import CollectionSet
from service.cores import BRIEF_WAITS

ROOT = Path(__file__).parents[1]
PATIENCE_S = 300.0


class _Process:
    """A process in a session of its own; `stop` pauses it and its children."""

    def __init__(self, command: list[str], environment: dict[str, str], **options: Any) -> None:
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            # As the service has it where the environment says nothing.
            env={**BRIEF_WAITS, **os.environ, **environment},
            start_new_session=True,
            **options,
        )

    def stop(self) -> None:
        os.killpg(self._process.pid, signal.SIGSTOP)

    def go(self) -> None:
        os.killpg(self._process.pid, signal.SIGCONT)

    @contextmanager
    def going(self) -> Iterator[None]:
        """Runs until the block ends."""
        self.go()
        try:
            yield
        finally:
            self.stop()

    def end(self) -> None:
        self.go()
        os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


class Server(_Process):
    path, field = "", ""

    def __init__(
        self, command: list[str], environment: dict[str, str], *, port: int, ready: str
    ) -> None:
        super().__init__(command, environment, stdout=subprocess.DEVNULL)
        self.port = port
        try:
            self._wait(ready)
        except BaseException:
            self.end()
            raise

    def target(self, path: str | None = None) -> Target:
        return Target(port=self.port, path=path or self.path, field=self.field)

    def _wait(self, path: str) -> None:
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5):
                    return
            except OSError as error:
                if self._process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"the server on port {self.port} is not ready") from error
                time.sleep(0.1)


class Service(Server):
    """`python -m service` with default settings, its collections in `folder`."""

    path, field = "/v1/embeddings", "image"

    def __init__(self, folder: Path, model: str) -> None:
        port = free_port()
        environment = {
            "DINOSCOPE_PORT": str(port),
            "DINOSCOPE_DATA_DIR": str(folder),
            "DINOSCOPE_MODEL": model,
            "DINOSCOPE_LOG_LEVEL": "warning",
        }
        super().__init__([sys.executable, "-m", "service"], environment, port=port, ready="/readyz")


class LitServe(Server):
    """`serving_litserve.py` with its settings."""

    path, field = "/predict", "request"

    def __init__(self, settings: dict[str, Any], model: str) -> None:
        self.settings = settings
        port = free_port()
        options = {"port": port, "model": model, **settings}
        arguments = [f"--{name}={value}" for name, value in options.items()]
        super().__init__(
            [sys.executable, "benchmarks/serving_litserve.py", *arguments],
            {},
            port=port,
            ready="/health",
        )

    @staticmethod
    def candidates(cores: int, *, clients: int) -> list[dict[str, Any]]:
        """Settings worth a trial: one process with all threads, or one for each core."""
        return [
            {"workers": workers, "threads": max(1, cores // workers), "batch": b, "timeout": t}
            for workers in sorted({1, cores})
            for b, t in ((clients, 0.0), (clients, 0.002), (clients // 2, 0.01))
        ]


class CeilingProcess(_Process):
    """`serving_ceiling.py`, asked over its standard input."""

    def __init__(self, folder: Path, model: str) -> None:
        super().__init__(
            [sys.executable, "benchmarks/serving_ceiling.py", str(folder), f"--model={model}"],
            {},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def do(self, what: str, **options: Any) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        print(json.dumps({"do": what, **options}), file=stdin, flush=True)
        line = stdout.readline()
        if not line:
            raise RuntimeError("the ceiling's process has ended; see its error above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def fill_collection(folder: Path, model: str, count: int) -> None:
    """A collection "filled" of `count` made-up pictures, its index built."""
    artifact = load_model(model).artifact
    architecture = artifact.architecture
    spaces = {
        "cls": architecture.embed_dim,
        "copy": architecture.embed_dim + architecture.token_dim,
    }
    rng = np.random.default_rng(0)
    centres = {name: rng.standard_normal((1000, size)) for name, size in spaces.items()}
    collections = CollectionSet(folder)
    try:
        made = collections.create("filled", spaces=spaces, model=artifact.fingerprint)
        for start in range(0, count, 1000):
            rows = range(start, min(start + 1000, count))
            of = rng.integers(1000, size=len(rows))
            vectors = {
                name: (centres[name][of] + rng.standard_normal((len(rows), size))).astype("f4")
                for name, size in spaces.items()
            }
            made.upsert(
                [
                    NewRecord(
                        id=f"picture-{row}.jpg",
                        vectors={name: values[i] for name, values in vectors.items()},
                        metadata={"name": f"picture-{row}.jpg"},
                        content_hash=f"{row:064x}",
                        thumbnail=None,
                    )
                    for i, row in enumerate(rows)
                ]
            )
        made.wait_until_built()
    finally:
        collections.close()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
