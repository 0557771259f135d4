import pytest
import torch

from backbone.architectures import Architecture, Backbone
from backbone.descriptors import copy_descriptor, describe


@pytest.fixture(scope="module")
def network() -> Backbone:
    torch.manual_seed(0)
    return Architecture(name="vit_tiny", patch_size=8, image_size=16).build().eval()


@torch.no_grad()
def test_one_forward_gives_what_each_alone_would(network: Backbone) -> None:
    pictures = torch.randn(2, 3, 16, 24)
    names = ["last4", "cls", "block-3", "cls+mean", "mean", "copy", "last1", "block-1"]
    found = describe(network, pictures, names)
    whole = network(pictures, last_blocks=12)
    blocks = [block[:, 0] for block in whole.blocks]
    assert list(found) == names
    expected = {
        "cls": whole.cls,
        "last1": whole.cls,
        "block-1": whole.cls,
        "block-3": blocks[9],
        "last4": torch.cat(blocks[8:], dim=1),
        "mean": whole.patches.mean(dim=1),
        "cls+mean": torch.cat((whole.cls, whole.patches.mean(dim=1)), dim=1),
        "copy": copy_descriptor(whole),
    }
    for name, vectors in expected.items():
        torch.testing.assert_close(found[name], vectors, msg=name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("clss", "'clss' is none of cls, mean, cls\\+mean, copy, lastN, block-N"),
        ("last0", "'last0' is none of"),
        ("last13", "'last13': the network has 12 blocks"),
        ("block-99", "'block-99': the network has 12 blocks"),
    ],
)
def test_what_it_does_not_have_is_refused(network: Backbone, name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        describe(network, torch.zeros(1, 3, 16, 16), ["cls", name])


@torch.no_grad()
def test_a_convolutional_network_has_one_block() -> None:
    torch.manual_seed(0)
    network = Architecture(name="resnet18", patch_size=1, image_size=32).build().eval()
    found = describe(network, torch.randn(1, 3, 32, 32), ["cls", "last1", "mean"])
    torch.testing.assert_close(found["last1"], found["cls"])
    torch.testing.assert_close(found["mean"], found["cls"])
    with pytest.raises(ValueError, match="'last4': the network has 1 block"):
        describe(network, torch.zeros(1, 3, 32, 32), ["last4"])
