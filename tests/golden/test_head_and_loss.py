import pytest
import torch

from tests.golden.conftest import Golden
from training.dino import ProjectionHead
from training.loss import DinoLoss
from training.schedules import cosine, linear_warmup


def test_heads(golden: Golden) -> None:
    settings, tensors = golden["head"], golden.tensors("head")
    assert settings["variants"]
    for name, variant in settings["variants"].items():
        head = ProjectionHead(
            settings["in_dim"],
            settings["out_dim"],
            hidden_dim=settings["hidden_dim"],
            bottleneck_dim=settings["bottleneck_dim"],
            layers=variant.get("layers", variant.get("nlayers", 3)),
            batch_norm=variant.get("use_bn", False),
            norm_last_layer=variant.get("norm_last_layer", True),
        )
        prefix = f"{name}.state."
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        head.load_state_dict(state)
        output = head.train()(tensors[f"{name}.input"])
        expected = tensors[f"{name}.output_train_mode"]
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_loss_gradient_and_centre(golden: Golden) -> None:
    settings, tensors = golden["loss"], golden.tensors("loss")
    kw = settings["kw"]
    loss = DinoLoss(
        kw["out_dim"],
        student_temperature=settings["student_temp"],
        center_momentum=settings["center_momentum"],
    )
    for i, (epoch, expected) in enumerate(zip(settings["epochs"], settings["losses"], strict=True)):
        student = tensors[f"student.{i}"].requires_grad_()
        terms = loss(student, tensors[f"teacher.{i}"], settings["teacher_temp_schedule"][epoch])
        terms.loss.backward()
        loss.update_center()
        assert terms.loss.item() == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(student.grad, tensors[f"grad.{i}"], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(loss.center, tensors[f"center_after.{i}"], rtol=1e-5, atol=1e-6)
        assert terms.kl.item() == pytest.approx(expected - terms.teacher_entropy.item(), abs=1e-5)


def test_teacher_temperature_schedule(golden: Golden) -> None:
    kw = golden["loss"]["kw"]
    for epoch, expected in enumerate(golden["loss"]["teacher_temp_schedule"]):
        value = linear_warmup(
            epoch,
            start=kw["warmup_teacher_temp"],
            end=kw["teacher_temp"],
            warmup_epochs=kw["warmup_teacher_temp_epochs"],
        )
        assert value == pytest.approx(expected, rel=1e-12)


def test_cosine_schedules(golden: Golden) -> None:
    assert golden["cosine"]
    for case in golden["cosine"]:
        base, final, epochs, steps, warmup_epochs, start = case["args"]
        values = [
            cosine(
                i,
                base=base,
                final=final,
                total_steps=epochs * steps,
                warmup_steps=warmup_epochs * steps,
                start=start,
            )
            for i in range(epochs * steps)
        ]
        assert values == pytest.approx(case["values"], rel=1e-9, abs=1e-15)
