"""Six whole training steps of the original, reproduced on every path that a recipe can take."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.golden.conftest import Golden
from tests.golden.trajectories import part, six_steps
from tests.training.conftest import command, finish

OPTIMIZERS = ["adamw", "sgd", "lars"]
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def without_key_bias(name: str, tensor: Tensor) -> Tensor:
    """Leaves out the bias of the keys, which changes no output.

    Softmax is blind to what all keys share, so that the bias's true gradient is zero. What AdamW
    makes of the rounding noise in its place differs between any two orders of summation.
    """
    if not name.endswith("attn.qkv.bias"):
        return tensor
    queries, _, values = tensor.chunk(3)
    return torch.cat((queries, values))


def compare(
    golden: Golden,
    optimizer: str,
    losses: list[float],
    networks: dict[str, dict[str, Tensor]],
    center: Tensor,
    **close: float,
) -> None:
    settings, tensors = golden[f"train_{optimizer}"], golden.tensors(f"train_{optimizer}")
    assert losses == pytest.approx(settings["losses"], rel=1e-5)
    for name, state in networks.items():
        expected = part(tensors, f"{name}_final.")
        assert expected.keys() == state.keys()
        for key, value in state.items():
            ours, theirs = (without_key_bias(key, tensor) for tensor in (value, expected[key]))
            torch.testing.assert_close(ours, theirs, **close, msg=lambda m, k=key: f"{k}: {m}")
    torch.testing.assert_close(center, tensors["center_final"], **close)


def compare_run(golden: Golden, optimizer: str, **path: Any) -> None:
    losses, training = six_steps(golden, optimizer, **path)
    networks = {n: getattr(training, n).state_dict() for n in ("student", "teacher")}
    compare(golden, optimizer, losses, networks, training.loss.center, **CLOSE)


def batch_of(golden: Golden) -> int:
    return golden.tensors("train_adamw")["global_crops.0"].shape[1]


def shares(golden: Golden) -> int:
    """The smallest number of equal parts, more than one, of a golden batch."""
    batch = batch_of(golden)
    return next(n for n in range(2, batch + 1) if batch % n == 0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_six_steps(golden: Golden, optimizer: str) -> None:
    compare_run(golden, optimizer)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_accumulated(golden: Golden, optimizer: str) -> None:
    """EMA, centre and schedules move once a step, whatever the number of forwards in it."""
    compare_run(golden, optimizer, accumulation=shares(golden))


def test_recomputed(golden: Golden) -> None:
    compare_run(golden, "adamw", recompute=True)


@pytest.mark.filterwarnings(  # the compiler's own, of torch 2.11 the second
    "ignore:The .grad attribute of a Tensor:UserWarning",
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
)
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on the CPU")
def test_compiled(golden: Golden) -> None:
    compare_run(golden, "adamw", compiled=True)


@pytest.mark.parametrize(
    ("optimizer", "strategy"),
    [("adamw", "ddp"), ("sgd", "ddp"), ("lars", "ddp"), ("adamw", "fsdp")],
)
def test_several_processes(golden: Golden, optimizer: str, strategy: str, tmp_path: Path) -> None:
    out, processes = tmp_path / "out.safetensors", shares(golden)
    launcher = command("torch.distributed.run", f"--nproc-per-node={processes}", "--standalone")
    module = ["-m", "tests.golden.trajectories", optimizer, strategy, str(out)]
    status, _, err = finish([*launcher, *module])
    assert status == 0, err
    state = load_file(out)
    networks = {n: part(state, f"{n}.") for n in ("student", "teacher")}
    compare(golden, optimizer, state["losses"].tolist(), networks, state["center"], **CLOSE)


def test_bf16_stays_near(golden: Golden) -> None:
    """bf16 keeps 8 bits of a number: losses within 3%, which a wrong term would not."""
    losses, _ = six_steps(golden, "adamw", autocast=torch.bfloat16)
    assert losses == pytest.approx(golden["train_adamw"]["losses"], rel=0.03)
