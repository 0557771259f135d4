"""The parts of a fine-tuning against what they stand for, written out."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from backbone.architectures import Architecture
from backbone.artifact import Artifact
from backbone.preprocess import Preprocess
from backbone.vit import VisionTransformer
from tests.training.conftest import CPU, picture
from training.evaluation.finetune_data import Mixer, drawn_from, training_view
from training.evaluation.finetune_loop import train_step
from training.evaluation.finetune_network import Classifier, layer_groups, make_classifier
from training.evaluation.finetune_protocol import Protocol
from training.tables import ConfigError

DEPTH = 3
SETTINGS: dict[str, Any] = {
    "image_size": 16,
    "epochs": 10,
    "batch_size": 64,
    "processes": 4,
    "warmup_epochs": 2.0,
    "init_lr": 1e-3,
    "min_lr": 1e-5,
    "weight_decay": 0.05,
    "layer_decay": 0.75,
    "drop_path": 0.1,
    "label_smoothing": 0.1,
    "mixup": 0.8,
    "cutmix": 1.0,
    "erasing": 0.25,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "min_scale": 0.08,
    "clip_grad": 0.0,
    "seed": 0,
    "from_scratch": False,
}


def protocol(**changes: Any) -> Protocol:
    return Protocol(**{**SETTINGS, **changes})


def vit() -> VisionTransformer:
    return VisionTransformer(image_size=16, patch_size=8, embed_dim=32, depth=DEPTH, num_heads=2)


def test_the_learning_rate_is_scaled_with_the_whole_batch() -> None:
    rates = [protocol().lr_at(step, 5) for step in range(50)]
    assert rates[0] == 0.0
    assert max(rates) == rates[9] == protocol().lr == 1e-3 * 64 * 4 / 512
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert protocol().lr_at(50, 5) == pytest.approx(1e-5 * 64 * 4 / 512)


def test_each_layer_learns_slower_than_the_one_above_it() -> None:
    classifier = Classifier(vit(), 5)
    groups = layer_groups(classifier, weight_decay=0.05, layer_decay=0.5)
    found = {
        id(p): (group["lr_scale"], group["weight_decay"])
        for group in groups
        for p in group["params"]
    }
    assert len(found) == sum(len(group["params"]) for group in groups)
    for name, parameter in classifier.named_parameters():
        part = name.removeprefix("backbone.").split(".")
        layer = {"head": DEPTH + 1, "norm": DEPTH + 1, "blocks": 0}.get(part[0], 0)
        if part[0] == "blocks":
            layer = 1 + int(part[1])
        plain = parameter.ndim == 1 or part[0] in ("cls_token", "pos_embed")
        assert found.pop(id(parameter)) == (0.5 ** (DEPTH + 1 - layer), 0.0 if plain else 0.05), (
            name
        )
    assert not found


def test_without_layer_decay_all_learn_alike() -> None:
    for backbone in (vit(), Architecture(name="shufflenet_v2_x0_5").build()):
        groups = layer_groups(Classifier(backbone, 5), weight_decay=0.05, layer_decay=1.0)
        assert {group["lr_scale"] for group in groups} == {1.0}


def test_a_convolutional_network_learns_but_has_no_layers_to_count() -> None:
    architecture = Architecture(name="shufflenet_v2_x0_5", image_size=32)
    artifact = Artifact(
        architecture=architecture,
        preprocess=Preprocess(resize=32, crop=32),
        weights=architecture.build().state_dict(),
    )
    classifier = make_classifier(artifact, 2, drop_path=0.0, seed=0, from_scratch=False, here=CPU)
    with pytest.raises(ConfigError, match=r"--layer-decay 0.75: only ViTs have blocks to count"):
        layer_groups(classifier, weight_decay=0.05, layer_decay=0.75)
    optimizer = torch.optim.AdamW(
        layer_groups(classifier, weight_decay=0.05, layer_decay=1.0), lr=0.0, fused=True
    )
    pictures, targets = torch.randn(8, 3, 32, 32), F.one_hot(torch.arange(8) % 2, 2).float()
    losses = [
        train_step(
            classifier.train(), optimizer, pictures, targets, lr=1e-3, clip_grad=1.0, dtype=None
        ).item()
        for _ in range(6)
    ]
    assert losses[-1] < losses[0] / 2


def test_batch_statistics_of_several_processes_need_cuda() -> None:
    architecture = Architecture(name="shufflenet_v2_x0_5", image_size=32)
    artifact = Artifact(
        architecture=architecture,
        preprocess=Preprocess(),
        weights=architecture.build().state_dict(),
    )
    two = type(CPU)(0, 2, CPU.device)
    with pytest.raises(ConfigError, match="shufflenet_v2_x0_5 has BatchNorm"):
        make_classifier(artifact, 2, drop_path=0.0, seed=0, from_scratch=False, here=two)


def test_a_step_is_adamw_with_each_layers_rate() -> None:
    torch.manual_seed(1)
    network, reference = Classifier(vit(), 5), Classifier(vit(), 5)
    reference.load_state_dict(network.state_dict())
    pictures, labels = torch.randn(6, 3, 16, 16), torch.arange(6) % 5
    groups = layer_groups(network, weight_decay=0.05, layer_decay=0.75)
    targets = Mixer(protocol(mixup=0, cutmix=0), 5)(pictures, labels, "")[1]
    ours = torch.optim.AdamW(groups, lr=0.0, fused=True)
    loss = train_step(network, ours, pictures, targets, lr=1e-2, clip_grad=0.5, dtype=None)

    expected = F.cross_entropy(reference(pictures), labels, label_smoothing=0.1)
    expected.backward()
    gradients = [p.grad for p in reference.parameters() if p.grad is not None]
    norm = torch.stack([g.norm() for g in gradients]).norm()
    scales = {
        id(p): (g["lr_scale"], g["weight_decay"])
        for g in layer_groups(reference, weight_decay=0.05, layer_decay=0.75)
        for p in g["params"]
    }
    assert norm > 0.5
    compared = 0
    for mine, theirs in zip(network.parameters(), reference.parameters(), strict=True):
        assert theirs.grad is not None
        lr, decay = 1e-2 * scales[id(theirs)][0], scales[id(theirs)][1]
        g = theirs.grad * (0.5 / (norm + 1e-6))
        kept = theirs.detach() * (1 - lr * decay)
        moved = kept - lr * g / (g.abs() + 1e-8)
        clear = g.abs() > 1e-5  # the step is the gradient's sign, which below is rounding's to say
        torch.testing.assert_close(mine.detach()[clear], moved[clear], rtol=1e-3, atol=2e-5)
        assert (mine.detach() - kept).abs().max() <= 1.001 * lr
        compared += int(clear.sum())
    assert compared > 0.9 * sum(p.numel() for p in reference.parameters())
    torch.testing.assert_close(loss, expected.detach())


def test_views_follow_from_their_key_and_leave_the_generators_alone() -> None:
    view = training_view(Preprocess(resize=16, crop=16), protocol(erasing=1.0))
    before = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    untouched = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    views = []
    for key in ("0/1/5", "0/2/5", "0/1/5"):
        with drawn_from(key):
            views.append(view(picture(3)))
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == untouched != before
    assert views[0].shape == (3, 16, 16)
    assert torch.equal(views[0], views[2])
    assert not torch.equal(views[0], views[1])


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_views_have_the_models_channels(channels: int) -> None:
    settings = Preprocess.in_proportion(16, patch_size=8, channels=channels)
    view = training_view(settings, protocol())
    for i, size in enumerate([(40, 30), (1, 1), (300, 1)]):
        with drawn_from(str(i)):
            assert view(Image.new("RGB", size, "red")).shape == (channels, 16, 16)


@pytest.mark.parametrize("policy", ["rand-m10-n9-p1-inc1", "rand-m0-n9-p1", "v0", "original"])
def test_policies_work_at_their_greatest_strength(policy: str) -> None:
    view = training_view(Preprocess(resize=16, crop=16), protocol(auto_augment=policy))
    for i in range(60):
        with drawn_from(str(i)):
            assert bool(view(picture(i)).isfinite().all())


def test_without_augmentation_a_view_is_a_crop_perhaps_flipped() -> None:
    plain = protocol(auto_augment="none", erasing=0.0, min_scale=1.0)
    settings = Preprocess(resize=16, crop=16)
    view, source = training_view(settings, plain), picture(4, (16, 16))
    upright = settings.to_tensor(source)
    kinds = set()
    for i in range(12):
        with drawn_from(str(i)):
            found = view(source)
        if torch.equal(found, upright):
            kinds.add("upright")
        elif torch.equal(found, upright.flip(2)):
            kinds.add("flipped")
    assert kinds == {"upright", "flipped"}


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_targets_say_how_much_of_each_picture_there_is(mixup: float, cutmix: float) -> None:
    mixer = Mixer(protocol(mixup=mixup, cutmix=cutmix, label_smoothing=0.0), 4)
    labels = torch.tensor([0, 1, 2, 3])
    ones = F.one_hot(labels, 4).float()
    for key in "abcdef":
        # Each picture is full of its own label's one-hot code, so that its mean tells its parts.
        source = ones[:, :, None, None].expand(-1, -1, 8, 8).clone()
        mixed, targets = mixer(source, labels, key)
        torch.testing.assert_close(mixed.mean(dim=(2, 3)), targets)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(4))
        again, _ = mixer(ones[:, :, None, None].expand(-1, -1, 8, 8).clone(), labels, key)
        assert torch.equal(mixed, again)


def test_without_mixing_labels_are_smoothed_and_any_batch_will_do() -> None:
    pictures, labels = torch.randn(3, 3, 8, 8), torch.tensor([0, 2, 1])
    mixed, targets = Mixer(protocol(mixup=0, cutmix=0, batch_size=3), 5)(pictures, labels, "")
    assert torch.equal(mixed, pictures)
    logits = torch.randn(3, 5)
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(F.cross_entropy(logits, targets), expected)


def test_a_head_starts_small_and_the_network_starts_as_the_model() -> None:
    architecture = Architecture(name="vit_tiny", patch_size=8, image_size=16)
    artifact = Artifact(
        architecture=architecture,
        preprocess=Preprocess(),
        weights=architecture.build().state_dict(),
    )
    make: Callable[..., Classifier] = make_classifier
    one = make(artifact, 7, drop_path=0.1, seed=1, from_scratch=False, here=CPU)
    again = make(artifact, 7, drop_path=0.1, seed=1, from_scratch=False, here=CPU)
    other = make(artifact, 7, drop_path=0.1, seed=1, from_scratch=True, here=CPU)
    torch.testing.assert_close(one.backbone.state_dict(), dict(artifact.weights), rtol=0, atol=0)
    assert torch.equal(one.head.weight, again.head.weight)
    assert one.head.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert not torch.equal(nn.utils.parameters_to_vector(one.backbone.parameters()),
                           nn.utils.parameters_to_vector(other.backbone.parameters()))  # fmt: skip
