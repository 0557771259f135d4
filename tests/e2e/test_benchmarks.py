"""A short form of the benchmarks: that they run and say what they promise, not what they find."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from benchmarks.serving_clients import Target, drive
from tests.training.conftest import finish


def test_training_against_the_textbook() -> None:
    sizes = ["--global-size=32", "--local-size=16", "--locals=1", "--k=64", "--batch=4"]
    short = ["--steps=1", "--rounds=1", "--workers=1", "--device=cpu", "--json"]
    status, out, err = finish([sys.executable, "benchmarks/training.py", *sizes, *short])
    assert status == 0, err
    found = json.loads(out.splitlines()[-1])
    for name in ("step_ratio", "end_to_end_ratio"):
        assert found[name] > 0
        assert found[f"{name}_same_precision"] > 0
    assert set(found["end_to_end"]) >= {"textbook", "ours"}


def test_extraction_against_the_forward() -> None:
    sizes = ["--architecture=vit_tiny", "--size=32", "--batch=4", "--pictures=5"]
    short = ["--rounds=1", "--queries=6", "--bank=50", "--k=3", "--device=cpu", "--json"]
    status, out, err = finish([sys.executable, "benchmarks/extraction.py", *sizes, *short])
    assert status == 0, err
    found = json.loads(out.splitlines()[-1])
    for name in ("extraction_ratio", "knn_seconds", "queries_seconds", "knn_vs_extraction"):
        assert found[name] > 0
    assert found["settings"]["workers"] == 0


def test_the_index_beside_others(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((30, 12))[rng.integers(30, size=1000)]
    vectors = (2 * centres + rng.standard_normal((1000, 12))) @ rng.standard_normal((12, 32))
    np.save(tmp_path / "real.npy", vectors.astype(np.float32))
    sizes = ["--sizes=2000", "--kind=hnsw", "--queries=50", "--rounds=1"]
    files = [f"--vectors={tmp_path / 'real.npy'}", f"--folder={tmp_path}"]
    plot = ["--plot", str(tmp_path / "growth.png")]
    status, out, err = finish(
        [sys.executable, "benchmarks/index.py", *sizes, *files, *plot, "--skip=hnswlib", "--json"]
    )
    assert status == 0, err
    found = json.loads(out.splitlines()[-1])
    for name in ("p50_ms", "vs_faiss", "ingest_per_s", "cold_start_s", "memory_ratio"):
        assert found[name] > 0
    assert 0.9 <= found["recall_at_10"] <= 1
    assert set(found["sizes"]) == {"2000"}
    largest = found["sizes"]["2000"]
    assert set(largest["rivals"]) == {"faiss", "numpy"}
    assert largest["rivals"]["numpy"]["recall_at_10"] >= 0.999
    assert largest["rivals"]["faiss"]["recall_at_10"] >= found["recall_at_10"]
    assert all(each["recall_at_10"] >= 0.9 for each in largest["filtered"].values())
    assert largest["growing"]["calm_max_ms"] > 0
    assert (tmp_path / "growth.png").stat().st_size > 10_000
    assert {p.name for p in tmp_path.iterdir()} == {"real.npy", "growth.png"}


def test_the_service_under_overload() -> None:
    """The promises hold in a few seconds too; with a deadline that a busy machine keeps."""
    short = ["--seconds=4", "--warm-up=2", "--deadline=30", "--json"]
    status, out, err = finish([sys.executable, "benchmarks/overload.py", *short])
    assert status == 0, err
    found = json.loads(out.splitlines()[-1])
    assert set(found["statuses"]) <= {"200", "429"}
    assert found["statuses"]["200"] > 0
    assert found["refused_without_retry_after"] == 0
    assert 0 < found["accepted_p99_s"] < found["deadline_s"]
    assert found["growth_mib"] < found["growth_bound_mib"]
    assert found["first_answer_after_s"] < found["deadline_s"]


def test_serving_beside_its_ceiling_and_litserve() -> None:
    short = [
        "--quick",
        "--clients=2",
        "--records=300",
        "--rounds=1",
        "--seconds=0.3",
        "--trial=0.1",
    ]
    few = ["--lots=1", "--lot=2", "--pictures=4", "--json"]
    rivals = ["litserve"] if find_spec("litserve") else []  # of the extra `benchmarks`
    skipped = [] if rivals else ["--skip=litserve"]
    status, out, err = finish([sys.executable, "benchmarks/serving.py", *short, *few, *skipped])
    assert status == 0, err
    found = json.loads(out.splitlines()[-1])
    for name in (
        "throughput_vs_ceiling_16",
        "throughput_vs_plain_ceiling_16",
        "throughput_vs_plain_ceiling_16_as_many",
        "throughput_vs_textbook_16",
        *(["throughput_vs_litserve_16", "throughput_vs_litserve_12mp"] if rivals else []),
        "latency_vs_ceiling_1",
        "latency_vs_textbook_1",
        "attention_vs_embedding",
        "int8_speedup",
        "int8_mean_cosine",
    ):
        assert found[name] > 0, name
    assert isinstance(found["search_minus_embedding_ms"], float)
    assert set(found["by_clients"]) == {"1", "4", "16", "64"}
    for kind in ("jpeg", "jpeg_12mp", "png_2mp"):
        names = ["ceiling", "plain ceiling", "textbook"]
        ceilings = [*names, *(f"{name}, as many" for name in names)]
        assert set(found["per_s"][kind]) == {*ceilings, "service", *rivals}
        assert min(found["per_s"][kind].values()) > 0


class Slow(BaseHTTPRequestHandler):
    """Answers `slow` pictures late, and closes connections that ask for nothing."""

    protocol_version = "HTTP/1.1"
    timeout = 0.3
    status = 200

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        time.sleep(1.0 if b"slow" in body else 0.0)
        self.send_response(self.status)
        self.send_header("Content-Length", "300000")
        self.end_headers()
        self.wfile.write(bytes(300_000))

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def slow() -> Iterator[Target]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Target(server.server_port)
        server.shutdown()
        thread.join()


def test_clients_wait_for_each_other(slow: Target) -> None:
    pictures = [b"slow" * 500_000, b"quick", b"quick"]  # the first is sent in several parts
    load = drive(slow, iter(pictures), clients=2)
    assert len(load.seconds_each) == 3
    assert max(load.seconds_each) >= 1.0  # the other connection was closed long before
    assert drive(slow, iter([]), clients=2).seconds_each == []


def test_clients_tell_of_errors(slow: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slow, "status", 503)
    with pytest.raises(RuntimeError, match=r"HTTP/1\.1 503"):
        drive(slow, iter([b"quick"]), clients=1)
