"""The whole path on real pictures: pretrain, export, serve in a process of its own, search."""

import io
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

REPOSITORY = Path(__file__).parents[2]
PICTURES = sorted((REPOSITORY / "docs" / "pictures").glob("*.jpg"))
RECIPE = """
epochs = 2
batch_size = 2
device = "cpu"
log_steps = 1
[data]
workers = 0
[model]
architecture = "vit_tiny"
patch_size = 8
[head]
out_dim = 64
hidden_dim = 32
[crops]
global_size = 32
local_count = 2
local_size = 16
[optimizer]
warmup_epochs = 0
"""


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    (folder / "recipe.toml").write_text(RECIPE)
    train = f"data.train={json.dumps(str(REPOSITORY / 'docs' / 'pictures'))}"
    run_dir = folder / "run"
    run("training.pretrain", str(folder / "recipe.toml"), train, f"run_dir={run_dir}")
    run("training.export", str(run_dir), str(folder / "model.safetensors"))
    return folder / "model.safetensors"


def start(model: Path, data_dir: Path) -> tuple[subprocess.Popen[bytes], httpx.Client]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "DINOSCOPE_MODEL": str(model),
        "DINOSCOPE_DATA_DIR": str(data_dir),
        "DINOSCOPE_PORT": str(port),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "service"], cwd=REPOSITORY, env={**os.environ, **settings}
    )
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60.0)
    deadline = time.monotonic() + 120.0
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if client.get("/readyz").status_code == 200:
                return process, client
        except httpx.TransportError:
            time.sleep(0.1)  # not listening yet
    process.kill()
    process.wait()
    raise AssertionError(f"the service did not become ready; exit status {process.returncode}")


def stop(process: subprocess.Popen[bytes], client: httpx.Client) -> None:
    client.close()
    process.terminate()
    assert process.wait(timeout=60) == 0


def test_pretrain_export_serve_search_restart(model: Path, tmp_path: Path) -> None:
    data_dir = tmp_path / "collections"
    process, client = start(model, data_dir)
    try:
        assert client.get("/v1/models").json()["data"][0]["id"] == "model"
        folder = str(REPOSITORY / "docs" / "pictures")
        ingest = ("service.ingest", folder, "--collection", "own", "--url", str(client.base_url))
        said = run(*ingest)
        sent = len([p for p in Path(folder).iterdir() if p.suffix in (".jpg", ".png")])
        assert said.startswith(f"{sent} created, 0 updated")
        before = [search(client, path) for path in PICTURES]
        assert [found[0]["id"] for found in before] == [path.name for path in PICTURES]
        cropped = [search(client, path, share=0.8) for path in PICTURES]
        assert [found[0]["id"] for found in cropped] == [path.name for path in PICTURES]
        attention = client.post("/v1/attention?head=all", files={"image": PICTURES[0].read_bytes()})
        with Image.open(io.BytesIO(attention.content)) as picture:
            assert picture.format == "PNG"
    finally:
        stop(process, client)

    process, client = start(model, data_dir)
    try:
        check_same([search(client, path) for path in PICTURES], before)
        assert run(*ingest[:-1], str(client.base_url)).startswith("0 created, 0 updated")
        collection = "/v1/collections/own"
        snapshot = client.post(f"{collection}/snapshots").json()["name"]
        assert client.delete(collection).json() == {"deleted": "own"}
        restored = client.post(f"{collection}/snapshots/{snapshot}/restore").json()
        assert restored["count"] == sent
        check_same([search(client, path) for path in PICTURES], before)
        last = PICTURES[-1].name
        chosen = {"must": {"key": "name", "match": {"value": last}}}
        query = {"id": PICTURES[0].name, "filter": chosen}
        matches = client.post(f"{collection}/search", json=query).json()["matches"]
        assert [match["id"] for match in matches] == [last]
    finally:
        stop(process, client)


def search(client: httpx.Client, path: Path, share: float = 1.0) -> list[dict[str, Any]]:
    """Searches with the centre of a picture, `share` of each side, saved again as JPEG."""
    with Image.open(path) as picture:
        margins = [round(side * (1.0 - share) / 2) for side in picture.size]
        inside = (*margins, picture.width - margins[0], picture.height - margins[1])
        buffer = io.BytesIO()
        picture.convert("RGB").crop(inside).save(buffer, "JPEG", quality=90)
    answer = client.post("/v1/collections/own/search?k=3", files={"image": buffer.getvalue()})
    assert answer.status_code == 200, answer.text
    matches: list[dict[str, Any]] = answer.json()["matches"]
    return matches


def check_same(found: list[list[dict[str, Any]]], expected: list[list[dict[str, Any]]]) -> None:
    """Equal but for rounding: each start measures anew how the network is computed fastest."""
    for some, others in zip(found, expected, strict=True):
        for one, other in zip(some, others, strict=True):
            assert one["score"] == pytest.approx(other["score"], abs=1e-5)
            assert {**one, "score": 0.0} == {**other, "score": 0.0}
