"""Convolutional networks against torchvision's own."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.ops import StochasticDepth

from backbone.architectures import Architecture
from backbone.convnet import FAMILIES, ConvNet, ParametersOnMeta, convnets
from backbone.descriptors import copy_descriptor, multiscale

# One of each family; those that take much memory are run without it, for their shapes.
SMALL = (
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "inception_v3",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
)
GIANT = ("alexnet", "resnext50_32x4d", "vgg11", "wide_resnet50_2")


def filled(network: nn.Module) -> nn.Module:
    """A skeleton with cheap weights, in evaluation mode; torchvision's own take seconds to draw."""
    network = network.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        if name.endswith("running_var"):
            tensor.fill_(0.5)
        elif tensor.ndim > 1:
            tensor.normal_(std=2 / tensor[0].numel() ** 0.5, generator=generator)
        else:
            tensor.fill_(0 if "running_mean" in name or "num_batches" in name else 1)
    return network


def without_memory(name: str) -> nn.Module:
    """torchvision's network, its parameters on the meta device."""
    auxiliary = name in ("googlenet", "inception_v3")
    options = {"aux_logits": False, "init_weights": True} if auxiliary else {}
    with ParametersOnMeta():
        network: nn.Module = get_model(name, weights=None, **options)
    return network


def into_the_last_layer(network: nn.Module, pictures: Tensor) -> Tensor:
    """What a torchvision network's last linear layer is given."""
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    given: list[Tensor] = []
    last.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    network(pictures)
    return given[0]


@pytest.mark.parametrize("name", SMALL)
def test_the_embedding_is_what_torchvisions_last_layer_is_given(name: str) -> None:
    described = Architecture(name=name)
    ours, theirs = filled(described.skeleton()), without_memory(name).eval()
    assert isinstance(ours, ConvNet)
    for child, module in ours.named_children():  # under torchvision's own names
        result = getattr(theirs, child).load_state_dict(module.state_dict(), False, assign=True)
        assert not result.unexpected_keys
        assert all(key.endswith(("weight", "bias")) for key in result.missing_keys)
        assert len(result.missing_keys) in (0, 2)  # the last linear layer
    last = [module for module in theirs.modules() if isinstance(module, nn.Linear)][-1]
    last.to_empty(device="cpu")
    pictures = torch.randn(2, 3, 80, 96)
    with torch.no_grad():
        features = ours(pictures)
        expected = into_the_last_layer(theirs, pictures)
    torch.testing.assert_close(features.cls, expected, rtol=1e-5, atol=1e-5)
    assert float(features.cls.std()) > 1e-6  # not all the same
    h, w = features.grid
    assert features.cls.shape == (2, described.embed_dim)
    assert features.patches.shape == (2, h * w, described.token_dim)
    assert (features.blocks, features.attention) == ((), None)
    descriptor = copy_descriptor(features)
    assert descriptor.shape == (2, described.embed_dim + described.token_dim)


@pytest.mark.parametrize("name", GIANT)
def test_the_largest_ones_without_memory(name: str) -> None:
    described = Architecture(name=name)
    network = described.skeleton().eval().to("meta")
    features = network(torch.empty(2, 3, 224, 200, device="meta"))
    assert features.cls.shape == (2, described.embed_dim)
    assert features.patches.shape == (2, features.grid[0] * features.grid[1], described.token_dim)
    expected = {"alexnet": (4096, 256), "vgg11": (4096, 512)}.get(name, (2048, 2048))
    assert (described.embed_dim, described.token_dim) == expected


def test_every_family_has_a_network_here() -> None:
    families = {f for f in FAMILIES for name in (*SMALL, *GIANT) if name.startswith(f)}
    assert families == set(FAMILIES)
    assert {"resnet50", "convnext_large", "efficientnet_v2_s"} <= set(convnets())


def test_resnet50_has_the_originals_names_and_size() -> None:
    described = Architecture(name="resnet50", patch_size=16)
    network = described.skeleton()
    names = list(network.state_dict())
    assert names[:2] == ["conv1.weight", "bn1.weight"]
    assert "layer4.2.conv3.weight" in names
    assert not any(name.startswith("fc") for name in names)
    assert described.embed_dim == network.embed_dim == 2048
    assert sum(p.numel() for p in network.parameters()) == 23_508_032  # the paper's 23M
    assert (described.num_heads, described.has_attention, described.patch_size) == (0, False, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_smallest_picture_of_a_family_is_what_it_says(family: str) -> None:
    name = next(name for name in (*SMALL, *GIANT) if name.startswith(family))
    described = Architecture(name=name)
    network, side = described.skeleton().eval().to("meta"), described.smallest_side
    assert min(network(torch.empty(1, 3, side, side, device="meta")).grid) >= 1
    if side == 1:
        return
    too_small = torch.empty(1, 3, side, side - 1, device="meta")
    with pytest.raises(ValueError, match=rf"{side} x {side - 1} pixels are too small for {name}"):
        network(too_small)
    with pytest.raises(ValueError, match=rf"image_size {side - 1} .* {side} pixels that {name}"):
        Architecture(name=name, image_size=side - 1)
    network.smallest_side = 1  # without the check nothing is left: the limit is no invention
    assert cells(network, too_small) == 0


def cells(network: nn.Module, pictures: Tensor) -> int:
    """Of the grid; 0 where a layer refuses what the one before it left (of which torch 2.11 makes
    an empty grid where there are only shapes)."""
    try:
        rows, columns = network(pictures).grid
    except RuntimeError:
        return 0
    return int(rows * columns)


@pytest.mark.parametrize(
    ("name", "channels"),
    [("resnet18", 1), ("resnet18", 4), ("convnext_tiny", 13), ("vgg11", 2), ("inception_v3", 1)],
)
def test_other_channels_change_the_first_convolution_alone(name: str, channels: int) -> None:
    other = Architecture(name=name, in_channels=channels).skeleton()
    ours, rgb = other.state_dict(), Architecture(name=name).skeleton().state_dict()
    assert ours.keys() == rgb.keys()
    changed = [key for key in ours if ours[key].shape != rgb[key].shape]
    assert changed == [next(iter(ours))]
    assert ours[changed[0]].shape[1] == channels
    pictures = torch.empty(1, channels, 80, 80, device="meta")
    assert other.eval().to("meta")(pictures).cls.shape == (1, other.embed_dim)
    with pytest.raises(ValueError, match=rf"not \[batch, {channels}, height, width\]"):
        other(torch.empty(1, channels + 1, 80, 80, device="meta"))


def test_a_grey_network_is_drawn_and_runs() -> None:
    torch.manual_seed(0)
    network = ConvNet("mobilenet_v3_small", in_channels=1).eval()
    first = next(network.parameters()).detach()
    assert first.shape[1] == 1
    assert float(first.std()) == pytest.approx((2 / (16 * 9)) ** 0.5, rel=0.2)
    assert bool(network(torch.randn(2, 1, 32, 32)).cls.isfinite().all())


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet5", "'resnet50'"),
        ("quantized_resnet50", "'resnet50'"),
        ("fasterrcnn_resnet50_fpn", "resnet50"),
        ("fcn_resnet50", "'resnet50'"),
        ("vit_b_16", "'vit_"),
        ("swin_t", ""),
        ("maxvit_t", ""),
        ("r3d_18", ""),
        ("squeezenet1_0", ""),  # ends in a convolution: there is no linear layer to take away
        ("resnet50_fpn", "'resnet50'"),
        ("", ""),
    ],
)
def test_other_networks_are_refused_with_near_names(name: str, near: str) -> None:
    with pytest.raises(ValueError, match="none of torchvision's convolutional classifiers") as said:
        Architecture(name=name)
    assert near in str(said.value)
    with pytest.raises(ValueError, match="none of torchvision's"):
        ConvNet(name)


def test_what_a_convolutional_network_does_not_have() -> None:
    network, pictures = ConvNet("mobilenet_v3_small").eval(), torch.randn(1, 3, 32, 32)
    for rows in ("cls", "full"):
        with pytest.raises(ValueError, match=f"attention is '{rows}'.*has none"):
            network(pictures, attention=rows)
    with pytest.raises(ValueError, match="last_blocks is 4"):
        network(pictures, last_blocks=4)
    with pytest.raises(ValueError, match="drop_path_rate 1"):
        ConvNet("mobilenet_v3_small", drop_path_rate=1.0)


def test_the_teacher_has_no_chance_in_it() -> None:
    """A teacher stays in training mode: dropout and stochastic depth would be noise there."""
    torch.manual_seed(0)
    network = ConvNet("efficientnet_b0").train()
    pictures = torch.randn(4, 3, 32, 32)
    assert torch.equal(network(pictures).cls, network(pictures).cls)


def test_stochastic_depth_rises_to_the_rate() -> None:
    network = ConvNet("efficientnet_b0", drop_path_rate=0.3)
    rates = [m.p for m in network.modules() if isinstance(m, StochasticDepth)]
    assert (rates[0], rates[-1]) == (0.0, pytest.approx(0.3))
    assert rates == sorted(rates)


def test_it_can_be_converted_to_synchronised_batch_norm_and_copied() -> None:
    torch.manual_seed(0)
    network = ConvNet("resnet18")
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(network)).eval()
    assert not any(type(m) is nn.BatchNorm2d for m in synchronised.modules())
    assert any(type(m) is nn.BatchNorm2d for m in network.modules())
    pictures = torch.randn(2, 3, 32, 32)
    assert torch.equal(synchronised(pictures).cls, network.eval()(pictures).cls)


def test_crops_of_several_sizes_are_embedded_in_their_order() -> None:
    torch.manual_seed(0)
    network = ConvNet("resnet18").eval()
    batches = [torch.randn(2, 3, 48, 48), torch.randn(3, 3, 32, 32)]
    apart = torch.cat([network(batch).cls for batch in batches])
    assert torch.equal(network.forward_cls(batches), apart)


def test_several_scales() -> None:
    torch.manual_seed(0)
    vector = multiscale(ConvNet("resnet18").eval(), torch.randn(2, 3, 64, 48))
    assert vector.shape == (2, 512)
    assert vector.norm(dim=1).tolist() == pytest.approx([1.0, 1.0])
