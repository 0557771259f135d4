"""Name -> network: the architectures that can be trained, published and served."""

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType

from backbone.vit import VisionTransformer

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
        name: one of `VITS`.
        patch_size: side of a patch in pixels.
        image_size: side in pixels of the pictures whose positions are learned.
        in_channels: channels of a picture.

    Raises:
        ValueError: an unknown name, or a size that is not positive or holds no patch.
    """

    name: str
    patch_size: int = 16
    image_size: int = 224
    in_channels: int = 3

    def __post_init__(self) -> None:
        if self.name not in VITS:
            near = difflib.get_close_matches(self.name, VITS, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"architecture {self.name!r} is not one of {', '.join(sorted(VITS))}{hint}"
            )
        for field in ("patch_size", "image_size", "in_channels"):
            value = getattr(self, field)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or not 1 <= value <= _MOST:
                raise ValueError(f"{field} is {value!r}, not a whole number from 1 to {_MOST}")
        if self.image_size < self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is smaller than patch_size {self.patch_size}"
            )

    @property
    def embed_dim(self) -> int:
        """D, the length of a CLS embedding."""
        return VITS[self.name].embed_dim

    @property
    def num_heads(self) -> int:
        """The number of attention heads."""
        return VITS[self.name].num_heads

    def build(self, *, drop_path_rate: float = 0.0) -> VisionTransformer:
        """A freshly initialised network; `drop_path_rate` matters in training alone."""
        return VisionTransformer(
            image_size=self.image_size,
            patch_size=self.patch_size,
            in_channels=self.in_channels,
            drop_path_rate=drop_path_rate,
            **asdict(VITS[self.name]),
        )
