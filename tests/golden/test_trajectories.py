import pytest
import torch

from backbone.vit import VisionTransformer
from tests.golden.conftest import Golden
from training.config import Data, Loss, Model, Optimizer, Recipe, Teacher
from training.dino import Network, ProjectionHead, make_teacher
from training.loss import DinoLoss
from training.optimizers import make_optimizer
from training.pretrain import rates_at, train_step
from training.state import Training


def recipe_of(settings: dict) -> Recipe:
    names = ("min_lr", "warmup_epochs", "weight_decay", "weight_decay_end")
    names += ("clip_grad", "freeze_last_layer_epochs", "lr")
    return Recipe(
        data=Data(train=("unused",)),
        epochs=settings["epochs"],
        model=Model(),
        loss=Loss(
            teacher_temperature=settings["teacher_temp"],
            warmup_teacher_temperature=settings["warmup_teacher_temp"],
            warmup_teacher_epochs=settings["warmup_teacher_temp_epochs"],
        ),
        teacher=Teacher(momentum=settings["momentum_teacher"]),
        optimizer=Optimizer(name=settings["optimizer"], **{n: settings[n] for n in names}),
    )


def network_of(settings: dict, state: dict[str, torch.Tensor]) -> Network:
    backbone = VisionTransformer(
        **{name: settings[name] for name in ("image_size", "patch_size", "embed_dim", "depth")},
        num_heads=settings["num_heads"],
        drop_path_rate=settings["drop_path_rate"],
    )
    head = ProjectionHead(
        settings["embed_dim"],
        settings["out_dim"],
        hidden_dim=settings["hidden_dim"],
        bottleneck_dim=settings["bottleneck_dim"],
        norm_last_layer=settings["norm_last_layer"],
    )
    network = Network(backbone, head)
    network.load_state_dict(state)
    return network


def part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def without_key_bias(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Leaves out the bias of the keys, which changes no output.

    Softmax is blind to what all keys share, so that the bias's true gradient is zero. What AdamW
    makes of the rounding noise in its place differs between any two orders of summation.
    """
    if not name.endswith("attn.qkv.bias"):
        return tensor
    queries, _, values = tensor.chunk(3)
    return torch.cat((queries, values))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_six_steps(golden: Golden, optimizer: str) -> None:
    settings, tensors = golden[f"train_{optimizer}"], golden.tensors(f"train_{optimizer}")
    recipe = recipe_of(settings)
    initial = part(tensors, "init.")
    student = network_of(settings, initial)
    training = Training(
        student=student,
        parallel=student,
        teacher=make_teacher(student, network_of(settings, initial)),
        loss=DinoLoss(settings["out_dim"]),
        optimizer=make_optimizer(optimizer, student),
        clip_grad=settings["clip_grad"],
        autocast=None,
    )
    losses = []
    for step in range(settings["steps"]):
        crops = [*tensors[f"global_crops.{step}"], *tensors[f"local_crops.{step}"]]
        rates = rates_at(step, settings["steps_per_epoch"], recipe, batch=256)
        losses.append(train_step(training, [crops], rates).terms.loss.item())

    assert losses == pytest.approx(settings["losses"], rel=1e-5)
    close = {"rtol": 1e-4, "atol": 1e-6}
    for network, name in ((student, "student_final."), (training.teacher, "teacher_final.")):
        expected = part(tensors, name)
        assert expected.keys() == network.state_dict().keys()
        for key, value in network.state_dict().items():
            ours, theirs = (without_key_bias(key, tensor) for tensor in (value, expected[key]))
            torch.testing.assert_close(ours, theirs, **close, msg=lambda m, k=key: f"{k}: {m}")
    torch.testing.assert_close(training.loss.center, tensors["center_final"], **close)
