"""Name -> network: the architectures that can be trained, published and served."""

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from types import MappingProxyType
from typing import TypeAlias

import torch

from backbone.convnet import (
    FAMILIES,
    ConvNet,
    ParametersOnMeta,
    convnets,
    is_convnet,
    smallest_side,
)
from backbone.vit import VisionTransformer

Backbone: TypeAlias = VisionTransformer | ConvNet

_MOST = 65536  # pixels or channels; a damaged header must not ask for a giant


@dataclass(frozen=True, kw_only=True)
class VitShape:
    """What tells one size of ViT from another."""

    embed_dim: int
    depth: int
    num_heads: int


VITS: Mapping[str, VitShape] = MappingProxyType(
    {
        "vit_tiny": VitShape(embed_dim=192, depth=12, num_heads=3),
        "vit_small": VitShape(embed_dim=384, depth=12, num_heads=6),
        "vit_base": VitShape(embed_dim=768, depth=12, num_heads=12),
        "vit_large": VitShape(embed_dim=1024, depth=24, num_heads=16),
    }
)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Everything that is needed to build a network, as an artifact's header tells it.

    Attributes:
        name: one of `VITS`, or one of torchvision's convolutional classifiers (`ConvNet`).
        patch_size: side of a ViT's patch in pixels. A convolutional network has no patches:
            whatever is given, its patch_size is 1, so that any size is a multiple of it.
        image_size: side in pixels of the pictures whose positions are learned; for a
            convolutional network that of the pictures it was trained on, on which nothing depends.
        in_channels: channels of a picture.

    Raises:
        ValueError: an unknown name, or a size that is not positive or too small for the network.
    """

    name: str
    patch_size: int = 16
    image_size: int = 224
    in_channels: int = 3

    def __post_init__(self) -> None:
        _check_name(self.name)
        for field in ("patch_size", "image_size", "in_channels"):
            value = getattr(self, field)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or not 1 <= value <= _MOST:
                raise ValueError(f"{field} is {value!r}, not a whole number from 1 to {_MOST}")
        if not self.has_attention:
            object.__setattr__(self, "patch_size", 1)
        self.check_side("image_size", self.image_size)

    @property
    def has_attention(self) -> bool:
        """Whether the network is a ViT."""
        return self.name in VITS

    @property
    def smallest_side(self) -> int:
        """The least side in pixels of a picture that the network can take."""
        return self.patch_size if self.has_attention else smallest_side(self.name)

    def check_side(self, field: str, side: int) -> None:
        """Raises a ValueError that names `field` where pictures of `side` pixels are too small."""
        if side < self.smallest_side:
            limit = f"patch_size {self.patch_size}"
            if not self.has_attention:
                limit = f"the {self.smallest_side} pixels that {self.name} needs"
            raise ValueError(f"{field} {side} is smaller than {limit}")

    @property
    def embed_dim(self) -> int:
        """D, the length of an embedding: a ViT's CLS, or what a convolutional network pools."""
        return VITS[self.name].embed_dim if self.has_attention else _widths(self.name)[0]

    @property
    def token_dim(self) -> int:
        """The length of a patch token; another than `embed_dim` in some convolutional networks."""
        return self.embed_dim if self.has_attention else _widths(self.name)[1]

    @property
    def depth(self) -> int:
        """Transformer blocks; 0 for a convolutional network."""
        return VITS[self.name].depth if self.has_attention else 0

    @property
    def num_heads(self) -> int:
        """The number of attention heads; 0 where there is no attention."""
        return VITS[self.name].num_heads if self.has_attention else 0

    def build(self, *, drop_path_rate: float = 0.0) -> Backbone:
        """A freshly initialised network; `drop_path_rate` matters in training alone."""
        if not self.has_attention:
            return ConvNet(self.name, in_channels=self.in_channels, drop_path_rate=drop_path_rate)
        return VisionTransformer(
            image_size=self.image_size,
            patch_size=self.patch_size,
            in_channels=self.in_channels,
            drop_path_rate=drop_path_rate,
            **asdict(VITS[self.name]),
        )

    def skeleton(self) -> Backbone:
        """The network with its parameters' names and shapes, the large ones on the meta device."""
        with torch.device("meta") if self.has_attention else ParametersOnMeta():
            return self.build()


def _check_name(name: object) -> None:
    if isinstance(name, str) and (name in VITS or is_convnet(name)):
        return
    near = difflib.get_close_matches(str(name), [*VITS, *convnets()], n=3, cutoff=0.5)
    hint = f"; did you mean {', '.join(map(repr, near))}?" if near else ""
    raise ValueError(
        f"architecture {name!r} is not one of {', '.join(sorted(VITS))}, and none of torchvision's "
        f"convolutional classifiers ({', '.join(f.rstrip('_') for f in FAMILIES)}){hint}"
    )


@cache
def _widths(name: str) -> tuple[int, int]:
    """Of a convolutional network: the length of its embedding, and of a token of its last map."""
    with ParametersOnMeta():
        network = ConvNet(name)
    return network.embed_dim, network.token_dim
