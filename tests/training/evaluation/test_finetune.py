"""Fine-tuning: it learns, goes on where it was killed, and is the same on two processes."""

import contextlib
import io
import json
import multiprocessing
import shutil
import signal
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from backbone.architectures import Architecture
from backbone.artifact import Artifact, read_artifact, write_artifact
from backbone.classifier import read_classifier
from backbone.preprocess import Preprocess
from tests.training.conftest import CPU, ROOT, command, finish, start
from training.evaluation import finetune_loop
from training.evaluation.__main__ import main
from training.evaluation.labelled import open_train_and_val

CLASSES = {
    "blue_square": ("blue", "rectangle"),
    "green_disc": ("green", "ellipse"),
    "red_square": ("red", "rectangle"),
    "yellow_disc": ("yellow", "ellipse"),
}
SIDE = 16


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Coloured shapes on noise in `train` and `val`, and a tiny untrained model."""
    folder = tmp_path_factory.mktemp("finetune")
    write_shapes(folder / "train", 12, seed=0)
    write_shapes(folder / "val", 5, seed=1)
    torch.manual_seed(7)
    architecture = Architecture(name="vit_tiny", patch_size=8, image_size=SIDE)
    artifact = Artifact(
        architecture=architecture,
        preprocess=Preprocess(resize=SIDE, crop=SIDE, copy_size=SIDE),
        weights=architecture.build().state_dict(),
        provenance={"licence": "CC0-1.0"},
    )
    write_artifact(artifact, folder / "model.safetensors")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def tidy(tmp_path: Path) -> Iterator[None]:
    """Snapshots are large, and pytest keeps the folders of three sessions."""
    yield
    shutil.rmtree(tmp_path)


def write_shapes(folder: Path, count: int, *, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for name, (colour, shape) in CLASSES.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            noise = rng.integers(60, 200, (3, 3, 3), dtype=np.uint8)
            picture = Image.fromarray(noise).resize((SIDE, SIDE))
            x, y = map(int, rng.integers(1, 5, 2))
            getattr(ImageDraw.Draw(picture), shape)((x, y, x + 9, y + 9), fill=colour)
            picture.save(folder / name / f"{i}.png")


def options(data: Path, out: Path, *more: str) -> list[str]:
    """Two epochs of six steps, with everything that has a chance in it."""
    return [
        *("finetune", "--model", str(data / "model.safetensors"), "--json", "--device", "cpu"),
        *("--train", str(data / "train"), "--val", str(data / "val"), "--out", str(out)),
        *("--epochs", "2", "--batch-size", "8", "--workers", "0", "--init-lr", "0.02"),
        *more,
    ]


def figures(arguments: list[str]) -> dict[str, Any]:
    """What the command tells, run in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as told:
        assert main(arguments) == 0
    found: dict[str, Any] = json.loads(told.getvalue())
    return found


@pytest.fixture(scope="module")
def unbroken(data: Path) -> dict[str, Any]:
    """The figures of a run that nothing has interrupted."""
    return figures(options(data, data / "unbroken"))


def test_it_learns_what_the_shapes_are_and_publishes_what_it_has_learned(
    data: Path, tmp_path: Path
) -> None:
    told = figures(options(data, tmp_path, "--epochs", "4", "--min-scale", "0.5"))
    last = told["finetune"]["last"]
    assert last["top1"] >= 75.0  # chance is 25
    assert last["top5"] == 100.0
    assert told["finetune"]["best"]["top1"] == max(r["top1"] for r in told["finetune"]["curve"])
    assert [row["epoch"] for row in told["finetune"]["curve"]] == [1, 2, 3, 4]

    artifact = read_artifact(tmp_path / "backbone.safetensors")
    parent = read_artifact(data / "model.safetensors")
    assert artifact.fingerprint == told["fingerprint_finetuned"] != told["fingerprint"]
    assert artifact.provenance["parent"]["fingerprint"] == told["fingerprint"] == parent.fingerprint
    assert artifact.provenance["licence"] == "CC0-1.0"
    assert artifact.quality == {"finetune": last}

    head = read_classifier(tmp_path / "classifier.safetensors", artifact)
    assert list(head.classes) == sorted(CLASSES)
    assert head.top1 == last["top1"]
    network, right = artifact.network(), 0
    for i, name in enumerate(head.classes):
        for path in sorted((data / "val" / name).iterdir()):
            with Image.open(path) as picture:
                cls = network(artifact.preprocess.centre_crop(picture)[None]).cls
            right += int(head(cls).argmax() == i)
    assert 100 * right / 20 == pytest.approx(last["top1"])


def test_a_run_that_is_killed_is_the_run_that_was_not(
    data: Path, tmp_path: Path, unbroken: dict[str, Any]
) -> None:
    arguments = options(data, tmp_path, "--snapshot-steps", "4", "--workers", "1")
    process = start([*command("training.evaluation"), *arguments])
    snapshots = tmp_path / "resume" / "snapshots"
    deadline = time.monotonic() + 200
    while not list(snapshots.glob("*.pt")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "backbone.safetensors").exists()

    told = figures(options(data, tmp_path))
    assert told["finetune"] == unbroken["finetune"]
    assert told["fingerprint_finetuned"] == unbroken["fingerprint_finetuned"]


def test_a_signal_stops_it_after_its_step_and_the_same_command_goes_on(
    data: Path, tmp_path: Path, unbroken: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0
    whole_step: Callable[..., Tensor] = finetune_loop.train_step

    def interrupted(*arguments: Any, **more: Any) -> Tensor:
        nonlocal steps
        steps += 1
        if steps == 9:  # in the middle of the second epoch
            signal.raise_signal(signal.SIGTERM)
        return whole_step(*arguments, **more)

    monkeypatch.setattr(finetune_loop, "train_step", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(options(data, tmp_path))
    assert stopped.value.code == 143
    assert steps == 9
    assert figures(options(data, tmp_path))["finetune"] == unbroken["finetune"]
    assert steps == 12


def test_a_finished_run_is_told_again_without_a_step(data: Path, unbroken: dict[str, Any]) -> None:
    again = figures(options(data, data / "unbroken"))
    assert again["finetune"] == unbroken["finetune"]
    assert again["fingerprint_finetuned"] == unbroken["fingerprint_finetuned"]


def test_two_processes_find_what_one_finds(data: Path, tmp_path: Path) -> None:
    # Pictures are mixed, and drop paths drawn, within a process: without them all is the same.
    same = ("--mixup", "0", "--cutmix", "0", "--drop-path", "0", "--epochs", "1")
    one = figures(options(data, tmp_path / "one", *same, "--batch-size", "16"))
    torchrun = command("torch.distributed.run", "--nproc-per-node=2", "--standalone")
    arguments = options(data, tmp_path / "two", *same, "--batch-size", "8")
    status, out, err = finish([*torchrun, "-m", "training.evaluation", *arguments])
    assert status == 0, err
    two = json.loads(out)
    assert two["environment"]["processes"] == 2
    for ours, theirs in zip(one["finetune"]["curve"], two["finetune"]["curve"], strict=True):
        assert ours["lr"] == theirs["lr"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["top1"] == pytest.approx(theirs["top1"], abs=5.1)  # one picture of 20


def test_from_scratch_starts_elsewhere(data: Path, tmp_path: Path) -> None:
    short = ("--epochs", "1", "--batch-size", "24")
    told = figures(options(data, tmp_path / "a", *short, "--from-scratch"))
    other = figures(options(data, tmp_path / "b", *short))
    assert told["finetune"]["last"]["loss"] != other["finetune"]["last"]["loss"]
    provenance = read_artifact(tmp_path / "a" / "backbone.safetensors").provenance
    assert provenance["parent"] is None
    assert provenance["protocol"]["from_scratch"] is True


def test_another_image_size_and_bf16(data: Path, tmp_path: Path) -> None:
    short = ("--epochs", "1", "--batch-size", "24", "--image-size", "24", "--precision", "bf16")
    told = figures(options(data, tmp_path, *short))
    assert told["protocol"]["image_size"] == told["protocol"]["resize"] == 24
    assert told["protocol"]["precision"] == "bf16"
    artifact = read_artifact(tmp_path / "backbone.safetensors")
    assert artifact.preprocess.crop == 24
    assert artifact.architecture.image_size == SIDE  # positions stay those of the learned grid


def test_real_pictures(tmp_path: Path) -> None:
    path = ROOT.parent / "shared" / "data" / "tiny-imagenet-val.tar.gz"
    if not path.exists():
        pytest.skip(f"{path.name} is not in {path.parent}")
    counts: dict[str, int] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            name = Path(member.name).parent.name
            enough = counts.get(name, 0) == 15 or (name not in counts and len(counts) == 5)
            if not member.isfile() or enough:
                continue
            counts[name] = counts.get(name, 0) + 1
            part = tmp_path / ("val" if counts[name] % 5 == 0 else "train") / name
            part.mkdir(parents=True, exist_ok=True)
            file = tar.extractfile(member)
            assert file is not None
            (part / Path(member.name).name).write_bytes(file.read())
    assert sum(counts.values()) == 75
    arguments = options(tmp_path, tmp_path / "out", "--image-size", "32")
    told = figures([*arguments, "--model", "default", "--batch-size", "20"])
    first, second = told["finetune"]["curve"]
    assert 0 < second["loss"] < first["loss"]
    assert told["data"]["classes"] == 5
    assert 0 <= second["top1"] <= second["top5"] == 100.0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--image-size", "20"], "--image-size 20: must be a multiple of the model's patch size 8"),
        (["--batch-size", "7"], "--batch-size 7: must be even"),
        (["--batch-size", "64"], "48 pictures do not fill one batch of 64"),
        (["--auto-augment", "rnd-m9"], "--auto-augment 'rnd-m9' is none of timm's policies"),
        (["--precision", "fp16"], "--precision fp16"),
        (["--warmup-epochs", "2"], "--warmup-epochs 2.0: must be from 0 to below --epochs"),
        (["--layer-decay", "0"], "--layer-decay 0.0: must be above 0 and at most 1"),
        (["--init-lr", "nan"], "--init-lr nan: must be above 0"),
        (["--min-lr", "1"], "--min-lr 1.0: must be from 0 to --init-lr"),
        (["--val", "OTHER"], "that --train lacks, e.g. 'purple' of 'purple/0.png'"),
        (["--train", "LONELY"], "class 'lonely' in --train has 1 picture"),
        (["--train", "BROKEN"], "picture 'green_disc/3.png' cannot be read"),
        (["--train", "BROKEN", "--workers", "1"], "picture 'green_disc/3.png' cannot be read"),
        (["--seed", str(2**32)], "--seed 4294967296: must be from 0 to"),
        (["--out", "FILE"], "cannot be a folder"),
    ],
)
def test_wrong_input_is_told(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    prepared = {
        "OTHER": {"train/red_square/0.png": "purple/0.png"},
        "LONELY": {"train/red_square/0.png": "lonely/0.png"},
        "BROKEN": {},
    }
    if more[1] == "FILE":
        (tmp_path / "FILE").write_text("a file")
    elif (changes := prepared.get(more[1])) is not None:
        shutil.copytree(data / more[0].removeprefix("--"), tmp_path / more[1])
        for source, target in changes.items():
            (tmp_path / more[1] / target).parent.mkdir()
            shutil.copy(data / source, tmp_path / more[1] / target)
        if more[1] == "BROKEN":
            (tmp_path / "BROKEN" / "green_disc" / "3.png").write_bytes(b"\x89PNG broken")
    if (tmp_path / more[1]).exists():
        more = [more[0], str(tmp_path / more[1]), *more[2:]]
    assert main(options(data, tmp_path / "out", *more)) == 2
    told = capsys.readouterr()
    assert told.out == ""
    error = told.err[told.err.rindex("error: ") :].strip()
    assert message in error
    assert "\n" not in error
    # Workers left over would be waited for at the interpreter's end, for a minute.
    assert multiprocessing.active_children() == []


def test_another_command_cannot_go_on_with_a_run(
    data: Path, unbroken: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert unbroken
    more = ["--weight-decay", "0.1", "--workers", "1"]  # workers are free to change
    assert main(options(data, data / "unbroken", *more)) == 2
    error = capsys.readouterr().err
    assert "holds a run of another command: weight_decay was 0.05 and is 0.1; take" in error


def test_a_loss_that_is_not_finite_ends_the_run(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options(data, tmp_path, "--init-lr", "1e30", "--warmup-epochs", "0")) == 2
    assert "the loss of epoch 1 is not finite: lower --init-lr" in capsys.readouterr().err
    assert not (tmp_path / "resume").exists()


def test_without_timm_the_extra_is_named(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "timm", None)
    assert main(options(data, tmp_path)) == 2
    assert "pip install '.[evaluation]'" in capsys.readouterr().err


def test_validation_counts_hits_of_the_true_classes(data: Path) -> None:
    class Constant(torch.nn.Module):
        """Class 3, then 0, 1, 2."""

        def forward(self, pictures: Tensor) -> Tensor:
            return torch.tensor([[3.0, 2.0, 1.0, 4.0]]).expand(len(pictures), -1)

    train, val = open_train_and_val([str(data / "train")], [str(data / "val")])
    network: Any = Constant()
    scores = finetune_loop.validate(
        network, val, Preprocess(resize=SIDE, crop=SIDE), here=CPU, dtype=None, batch_size=6,
        workers=0,
    )  # fmt: skip
    assert scores == {"top1": 25.0, "top5": 100.0}
    assert len(train.labels) == 48
