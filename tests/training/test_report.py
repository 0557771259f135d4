import base64
import json
import math
import platform
import re
import shutil
import subprocess
import tarfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import nn

from tests.training.conftest import TINY_RECIPE, write_pictures
from tests.training.tiny_runs import tiles
from training.attention_maps import attention_maps, fixed_pictures, read_film
from training.collapse import CollapseAlarm
from training.config import Recipe, recipe_from_dict, recipe_to_dict
from training.curves import loss_panel
from training.data import at_random, open_source
from training.distributed import World
from training.environment import environment, write_environment
from training.monitors import COLUMNS
from training.online_knn import COLUMNS as KNN_COLUMNS
from training.report import ReportError, main, write_report
from training.rows import RowFile
from training.sources import open_pictures
from training.watch import Watch

CPU = World(0, 1, torch.device("cpu"))


class Page(HTMLParser):
    """What a browser finds: words, pictures, and anything that would be fetched."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.words: list[str] = []
        self.pictures: list[str] = []
        self.fetched: list[str] = []
        self.classes: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.classes.append(found.get("class", ""))
        if tag in ("script", "link", "iframe"):
            self.fetched.append(tag)
        if address := found.get("src") or found.get("href"):
            (self.pictures if address.startswith("data:image/") else self.fetched).append(address)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def recipe(run_dir: Path, **changes: Any) -> Recipe:
    table = {**TINY_RECIPE, "run_dir": str(run_dir), "data": {"train": "x", "workers": 0}}
    return recipe_from_dict({**table, **changes})


def backbone(recipe: Recipe, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return recipe.architecture.build()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A folder as a run leaves it, but for k-NN, alarms and attention."""
    folder = tmp_path / "run <1>"
    folder.mkdir()
    (folder / "recipe.json").write_text(json.dumps(recipe_to_dict(recipe(folder))))
    write_environment(folder, CPU, start=0)
    log = RowFile(folder / "log.csv", COLUMNS, start=0)
    for step in range(1, 1001):
        row = {name: 0.5 + math.sin(step / 50) ** 2 for name in COLUMNS}
        log.write({**row, "step": step, "epoch": step // 250, "eta_s": 1000.0 - step})
    log.close()
    return folder


def svgs(page: Page) -> list[str]:
    found = []
    for picture in page.pictures:
        kind, content = picture.removeprefix("data:image/").split(";base64,")
        if kind == "svg+xml":
            found.append(base64.b64decode(content).decode())
            ElementTree.fromstring(found[-1])
    return found


def test_a_page_without_knn_and_attention_says_so(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run_dir)]) == 0
    assert capsys.readouterr().out.strip() == str(run_dir / "report.html")
    page = Page(run_dir / "report.html")
    assert page.fetched == []
    assert len(svgs(page)) == 13
    assert "run <1>" in page.text
    assert "finished: 1,000 steps" in page.text
    assert "No alarm" in page.text
    assert "No k-NN curve: set knn.train and knn.val" in page.text
    assert "No attention maps: they are of ViTs alone" in page.text
    for word in ("model.architecture", "vit_tiny", "optimizer.warmup_epochs", torch.__version__):
        assert word in page.text


def test_a_single_logged_step_is_seen_in_the_chart_of_the_loss() -> None:
    row = {"step": 20.0, "loss": 7.0, "teacher_entropy": 4.0, "kl": 3.0}
    drawn = loss_panel({k: np.array([v]) for k, v in row.items()}, ceiling=7.6, marks=())
    areas = re.findall(r'<g id="FillBetween.*?<path [^>]*? d="([^"]*)"', drawn.decode(), re.DOTALL)
    assert len(areas) == 2
    for area in areas:
        assert len(set(re.findall(r"[ML] (\S+) ", area))) > 1


def test_knn_alarms_and_progress_are_shown(run_dir: Path) -> None:
    knn = RowFile(run_dir / "knn.csv", KNN_COLUMNS, start=0)
    for step in (500, 900):
        for network in ("student", "teacher"):
            row = {"step": step, "epoch": step // 250, "network": network, "top1": 41.26}
            knn.write({**row, "top5": 80.0})
    knn.close()
    alarm = CollapseAlarm(64, patience_steps=10)
    collapse, clear, again = (
        [line for step in range(first, first + 100, 10) for line in alarm.see(step, *figures)]
        for first, figures in ((100, (0.0, 0.0)), (300, (3.0, 1.0)), (600, (4.15, 0.0)))
    )
    said = [f"step {n}: {line}" for n, (line,) in enumerate((collapse, clear, again), 1)]
    (run_dir / "alarms.log").write_text("\n".join(said) + "\n")
    page = Page(write_report(run_dir))
    assert len(svgs(page)) == 14
    assert "k-NN, teacher 41.3 % top-1" in page.text
    assert all(line in page.text for line in said)
    assert (page.classes.count("bad"), page.classes.count("over")) == (1, 2)  # one still lasts
    assert "No alarm" not in page.text

    rows = (run_dir / "log.csv").read_text().splitlines()
    (run_dir / "log.csv").write_text("\n".join(rows[:201]) + "\n")
    assert "step 200, in epoch 1, about 0:13:20 to go" in Page(write_report(run_dir)).text


def test_a_log_of_an_older_version_is_drawn(run_dir: Path) -> None:
    """Its columns that are missing have no curve."""
    text = "step,epoch,loss,teacher_entropy,kl,gradient_norm\n1,0,3,2,1,nan\n2,0,3,2,1,1\n"
    (run_dir / "log.csv").write_text(text)
    (run_dir / "environment.json").unlink()
    page = Page(write_report(run_dir))
    assert len(svgs(page)) == 3
    assert "step 2, in epoch 1" in page.text
    assert "Not recorded." in page.text


def test_attention_maps_of_fixed_pictures_over_time(run_dir: Path) -> None:
    made = recipe(run_dir, report={"pictures": 3})
    sources = run_dir / "pictures"
    sources.mkdir()
    for i, tile in enumerate(tiles()[:20]):
        tile.save(sources / f"{i:02d}.png")
    (sources / "00.png").write_bytes(b"no picture")
    maps = attention_maps(made, open_pictures([sources]), CPU)
    assert maps is not None
    state = torch.get_rng_state()
    for step, epoch in ((0, 0), (250, 0), (1000, 3)):
        network = backbone(made, seed=step)
        torch.set_rng_state(state)
        maps.store(step, epoch, network)
        assert torch.equal(torch.get_rng_state(), state)
        assert network.training
    film = read_film(run_dir)
    assert film is not None
    assert (film.steps, film.epochs) == ([0, 250, 1000], [0, 0, 3])
    assert film.maps.shape == (3, 3, 3, 4, 4)  # times, pictures, heads, patches of 8 in 32 pixels
    with torch.inference_mode():
        view = maps._inputs[:1]
        expected = network.eval()(view, attention="cls").attention[0, :, 1:].reshape(3, 4, 4)
    np.testing.assert_allclose(film.maps[2, 0], expected.numpy(), rtol=2e-3)
    page = Page(write_report(run_dir))
    assert "untrained epoch 1, step 250 epoch 4, step 1,000" in page.text
    assert "Each head, after step 1,000" in page.text
    jpegs = [picture for picture in page.pictures if "image/jpeg" in picture]
    assert len(jpegs) == 3 * (1 + 3) + 3 * (1 + 3)
    assert len(set(jpegs)) >= 3 * (1 + 3 + 3)


@pytest.mark.parametrize("count", [0, 1, 5, 9])
def test_fixed_pictures_are_the_same_each_time_and_readable(tmp_path: Path, count: int) -> None:
    names = write_pictures(tmp_path, 8)
    for name in names[::3]:
        (tmp_path / name).write_bytes(b"no picture")
    pictures = open_pictures([tmp_path])
    found, again = (fixed_pictures(pictures, count) for _ in range(2))
    assert len(found) == min(count, 5)
    assert [p.tobytes() for p in found] == [p.tobytes() for p in again]


def test_nothing_to_follow(tmp_path: Path) -> None:
    write_pictures(tmp_path, 2)
    pictures = open_pictures([tmp_path])
    assert attention_maps(recipe(tmp_path, report={"pictures": 0}), pictures, CPU) is None
    six = {"train": "x", "channels": 6}
    assert attention_maps(recipe(tmp_path, data=six), pictures, CPU) is None
    model = {"architecture": "resnet18"}
    crops = {"global_size": 64, "local_count": 0, "local_size": 32}
    assert attention_maps(recipe(tmp_path, model=model, crops=crops), pictures, CPU) is None


def test_a_folder_that_holds_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    with pytest.raises(ReportError):
        write_report(tmp_path / "nowhere")


def test_an_epochs_end_measures_and_draws_what_is_due(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for i, tile in enumerate(tiles()[::8]):
            path = tmp_path / part / f"class{i // 2}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            tile.save(path)
    made = recipe(
        tmp_path / "run",
        knn={"train": f"{tmp_path}/train", "val": f"{tmp_path}/val", "every_epochs": 3, "k": 1},
        report={"every_epochs": 2, "pictures": 1},
    )
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "recipe.json").write_text(json.dumps(recipe_to_dict(made)))
    watch = Watch(made, CPU, open_pictures([tmp_path / "train"]))
    network = backbone(made)
    watch.begins(network)
    due = []
    for epoch in range(4):
        scores = watch.epoch_ends(epoch + 1, epoch, student=network, teacher=network)
        due.append((sorted(scores), (run_dir / "report.html").exists()))
        log = RowFile(run_dir / "log.csv", COLUMNS, start=epoch)
        log.write({"step": epoch + 1, "epoch": epoch, "loss": 1.0})
        log.close()
    tags = [f"knn/{n}_{score}" for n in ("student", "teacher") for score in ("top1", "top5")]
    # The second epoch's report finds no row yet; the last epoch gets everything.
    assert due == [([], False), ([], True), (tags, True), (tags, True)]
    film = read_film(run_dir)
    assert film is not None
    assert film.steps == [0, 2, 4]
    assert scores["knn/teacher_top1"] == 100.0  # asked for what it knows


@pytest.mark.parametrize("kind", ["shards", "on_device", "none"])
def test_sources_that_give_no_encoded_pictures(tmp_path: Path, kind: str) -> None:
    write_pictures(tmp_path / "train" / "a", 2)
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        tar.add(tmp_path / "train", "train")
    labelled = {"train": f"{tmp_path}/train", "val": f"{tmp_path}/train", "k": 1}
    table = {"train": f"{tmp_path}/train", "workers": 0, "on_device": kind == "on_device"}
    if kind != "on_device":
        table |= {"train": f"{tmp_path}/shard.tar", "stream": True}
    made = recipe(tmp_path / "run", data=table, knn={} if kind == "none" else labelled)
    watch = Watch(made, CPU, at_random(open_source(made.data, tmp_path / "run", CPU)))
    watch.begins(backbone(made))
    film = read_film(tmp_path / "run")
    assert (film is None) == (kind == "none")


def test_the_environment_tells_what_a_run_was_made_with(tmp_path: Path) -> None:
    write_environment(tmp_path, CPU, start=40)
    found = json.loads((tmp_path / "environment.json").read_text())
    assert found["torch"] == torch.__version__
    assert found["torchvision"]
    assert (found["processes"], found["device"], found["from_step"]) == (1, "cpu", 40)
    assert "python" in " ".join(found["command"])

    assert platform.node() not in found.values()


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git here")
def test_the_commit_is_the_repositorys_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        name = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *name, *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    module = tmp_path / "training" / "environment.py"
    module.parent.mkdir()
    module.write_text("old")
    monkeypatch.setattr("training.environment.__file__", str(module))
    assert environment(CPU)["commit"] is None
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "a commit")
    commit = git("rev-parse", "HEAD")
    assert environment(CPU)["commit"] == commit
    module.write_text("new")
    assert environment(CPU)["commit"] == f"{commit}+changes"
