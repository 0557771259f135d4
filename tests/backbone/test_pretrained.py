import argparse
import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
import torch
from torch import Tensor

from backbone import pretrained
from backbone.architectures import Architecture
from backbone.artifact import Artifact, ArtifactError, write_artifact
from backbone.preprocess import Preprocess
from backbone.pretrained import Download, load_model, read_checkpoint

ARCHITECTURE = Architecture(name="vit_tiny", patch_size=16, image_size=64)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return ARCHITECTURE.build().state_dict()


def full_checkpoint(weights: dict[str, Tensor]) -> dict[str, Any]:
    """What the original's main_dino.py saves, with another student than teacher."""

    def network(prefix: str, shift: float) -> dict[str, Tensor]:
        entries = {f"{prefix}backbone.{k}": v + shift for k, v in weights.items()}
        head = {"mlp.0.weight": torch.zeros(8, 192), "last_layer.weight_g": torch.ones(8, 1)}
        return {**entries, **{f"{prefix}head.{k}": v for k, v in head.items()}}

    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    optimizer = torch.optim.AdamW([parameter])
    optimizer.step()
    return {
        "student": network("module.", 1.0),
        "teacher": network("", 0.0),
        "optimizer": optimizer.state_dict(),
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_tiny", lr=5e-4, local_crops_scale=(0.05, 0.4)),
        "dino_loss": {"center": torch.zeros(1, 8)},
        "fp16_scaler": None,
    }


def saved(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def assert_same(artifact: Artifact, weights: dict[str, Tensor]) -> None:
    torch.testing.assert_close(dict(artifact.weights), weights, rtol=0, atol=0)


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone."])
def test_a_backbone_alone(weights: dict[str, Tensor], tmp_path: Path, prefix: str) -> None:
    path = saved(tmp_path, {f"{prefix}{k}": v for k, v in weights.items()})
    artifact = read_checkpoint(path)
    assert artifact.architecture == ARCHITECTURE
    assert_same(artifact, weights)
    assert artifact.preprocess == Preprocess.in_proportion(64, patch_size=16)
    assert artifact.provenance["source"] == "checkpoint.pth"
    assert len(artifact.fingerprint) == 16
    assert artifact.network()(torch.zeros(1, 3, 64, 64)).cls.shape == (1, 192)


def test_a_full_checkpoint_gives_the_teacher(weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = saved(tmp_path, full_checkpoint(weights))
    assert_same(read_checkpoint(path), weights)
    assert_same(load_model(str(path)).artifact, weights)


def test_a_full_checkpoint_gives_the_student_where_asked(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = saved(tmp_path, full_checkpoint(weights))
    student = read_checkpoint(path, key="student")
    assert_same(student, {k: v + 1.0 for k, v in weights.items()})


def test_the_published_sizes_are_the_papers(tmp_path: Path) -> None:
    described = Architecture(name="vit_small", patch_size=8)
    artifact = read_checkpoint(saved(tmp_path, described.build().state_dict()))
    assert artifact.architecture == described
    sizes = artifact.preprocess
    assert (sizes.resize, sizes.crop, sizes.copy_size) == (256, 224, 320)


@pytest.mark.parametrize("content", [[1, 2], "text", 5, {}, {"a": 1}, {"teacher": 3}])
def test_content_that_is_no_network(tmp_path: Path, content: object) -> None:
    assert refusal(saved(tmp_path, content))


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 no zip"])
def test_files_that_are_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(content)
    assert "cannot be read safely" in refusal(path)


def test_a_checkpoint_cut_short(weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = saved(tmp_path, weights)
    path.write_bytes(path.read_bytes()[:1_000_000])
    refusal(path)


CHANGES = {
    "another network": ({"conv1.weight": torch.zeros(64, 3, 7, 7)}, None, "no ViT"),
    "extra entry": ({"fc_norm.weight": torch.ones(192)}, "norm.weight", "fc_norm.weight"),
    "misshaped": ({"norm.weight": torch.ones(7)}, "norm.weight", "norm.weight"),
    "not finite": ({"norm.weight": torch.full((192,), torch.nan)}, "norm.weight", "finite"),
    "no tensors": ({"norm.weight": 3}, "norm.weight", "not tensors: ['norm.weight']"),
    "odd block": ({"blocks.odd.weight": torch.ones(3)}, "norm.weight", "depth 13"),
    "no positions": ({"pos_embed": torch.zeros(1, 1, 192)}, "pos_embed", "image_size"),
    "uneven positions": ({"pos_embed": torch.zeros(1, 19, 192)}, "pos_embed", "pos_embed"),
    "flat positions": ({"pos_embed": torch.zeros(17, 192)}, "pos_embed", "no ViT"),
    "another width": ({"pos_embed": torch.zeros(1, 17, 200)}, "pos_embed", "width 200"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_networks_that_do_not_fit(weights: dict[str, Tensor], tmp_path: Path, change: str) -> None:
    entries, keep, words = CHANGES[change]
    content = {**(weights if keep else {}), **entries}
    assert words in refusal(saved(tmp_path, content))


class Malice:
    """Runs a command when it is unpickled by a careless reader."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_checkpoint_is_run(
    weights: dict[str, Tensor], tmp_path: Path, zipped: bool
) -> None:
    trace = tmp_path / "trace"
    path = tmp_path / "checkpoint.pth"
    content = {**weights, "extra": Malice(f"touch {trace}")}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    said = refusal(path)
    assert "cannot be read safely" in said
    assert "weights_only" not in said  # no advice on how to run it nevertheless
    assert not trace.exists()
    torch.load(path, weights_only=False)  # the trap is a real one
    assert trace.exists()


def test_an_artifact_by_its_path(weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    artifact = Artifact(
        architecture=ARCHITECTURE,
        preprocess=Preprocess.in_proportion(64, patch_size=16),
        weights=weights,
    )
    fingerprint = write_artifact(artifact, path)
    loaded = load_model(str(path))
    assert (loaded.name, loaded.artifact.fingerprint) == ("mine", fingerprint)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("dino_vits61", "dino_vits16"), ("dino-vitb8", "dino_vitb8"), ("defualt", "default")],
)
def test_an_unknown_name_gets_a_suggestion(name: str, nearest: str) -> None:
    with pytest.raises(ArtifactError, match=f"did you mean '{nearest}'"):
        load_model(name)


def test_a_path_that_is_not_there() -> None:
    with pytest.raises(ArtifactError, match=r"models/none\.pth.*neither a file nor one of.*dino_"):
        load_model("models/none.pth")


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder; counts the files that it gives."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """A web site: its address, its folder, and the paths asked for."""
    folder = tmp_path / "site"
    folder.mkdir()
    asked: list[str] = []
    handler = type("CountingHandler", (Handler,), {"asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", folder, asked
        server.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where downloads go in this test."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


def offer(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    downloads = {**pretrained.DOWNLOADS, "dino_vits16": Download(url=url)}
    monkeypatch.setattr(pretrained, "DOWNLOADS", downloads)


def test_the_published_names() -> None:
    assert {"dino_vits16", "dino_vits8", "dino_vitb16", "dino_vitb8"} <= set(pretrained.DOWNLOADS)
    for download in pretrained.DOWNLOADS.values():
        assert download.url.startswith("https://dl.fbaipublicfiles.com/dino/")
        assert download.licence == "Apache-2.0"


def test_a_known_name_is_downloaded_once(
    weights: dict[str, Tensor],
    site: tuple[str, Path, list[str]],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url, folder, asked = site
    torch.save(weights, folder / "small.pth")
    offer(monkeypatch, f"{url}/small.pth")
    for _ in range(2):
        model = load_model("dino_vits16")
        assert model.name == "dino_vits16"
        assert model.artifact.provenance["licence"] == "Apache-2.0"
        assert model.artifact.provenance["source"] == "small.pth"
        assert_same(model.artifact, weights)
    assert asked == ["/small.pth"]
    assert [path.name for path in cache.iterdir()] == ["small.pth"]


def failed_download(url: str, cache: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        load_model("dino_vits16")
    said, cause = str(caught.value), caught.value.__cause__
    if isinstance(cause, HTTPError):
        cause.close()  # or its socket is reported as leaked
    assert url in said
    assert str(cache / "small.pth") in said  # where to put the file by hand
    assert not list(cache.iterdir())
    return said


def test_a_download_that_fails(
    site: tuple[str, Path, list[str]], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{site[0]}/small.pth"
    offer(monkeypatch, url)
    assert "404" in failed_download(url, cache)


def test_a_site_that_is_not_there(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        url = f"http://127.0.0.1:{server.server_port}/small.pth"
    offer(monkeypatch, url)  # the port is closed again
    failed_download(url, cache)


def test_half_a_download_is_not_kept(
    weights: dict[str, Tensor],
    site: tuple[str, Path, list[str]],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url, folder, _ = site
    whole = saved(folder, weights).read_bytes()
    (folder / "small.pth").write_bytes(whole[: len(whole) // 2])
    offer(monkeypatch, f"{url}/small.pth")
    failed_download(f"{url}/small.pth", cache)
    (folder / "small.pth").write_bytes(whole)
    assert_same(load_model("dino_vits16").artifact, weights)


def test_a_file_put_there_by_hand_is_taken(
    weights: dict[str, Tensor], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(monkeypatch, "http://127.0.0.1:1/small.pth")
    cache.mkdir(parents=True)
    torch.save(weights, cache / "small.pth")
    assert_same(load_model("dino_vits16").artifact, weights)
