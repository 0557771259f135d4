"""Tokens -> vectors and masks: what evaluations and the service compute from a network's output."""

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from backbone.architectures import Backbone
from backbone.vit import Features, VisionTransformer


def copy_descriptor(features: Features, *, p: float = 4.0) -> Tensor:
    """CLS and the patch tokens' generalised mean, [B, D + E], not normalised (paper, section 4.2).

    D is the length of an embedding and E that of a patch token; in a ViT they are the same. Of a
    convolutional network they are the pooled embedding and the places of its last feature map.
    Whitening and normalisation belong to the collection that is searched.
    """
    return torch.cat((features.cls, generalised_mean(features.patches, p=p)), dim=1)


def generalised_mean(patches: Tensor, *, p: float = 4.0) -> Tensor:
    """GeM pooling (arXiv 1711.02512) of patches [B, N, D] -> [B, D]; p = 1 is the mean.

    Values below 1e-6 are raised to it, as in the original, so that the root exists.
    """
    return patches.clamp(min=1e-6).pow(p).mean(dim=1).pow(1.0 / p)


def multiscale(network: Backbone, picture: Tensor) -> Tensor:
    """CLS summed over the scales 1, 1/sqrt 2 and 1/2, then L2-normalised: [B, D].

    Pictures [B, C, H, W] are scaled bilinearly, as the original does it for retrieval.

    Raises:
        ValueError: the smallest scale is too small for the network.
    """
    total = torch.zeros(len(picture), network.embed_dim, device=picture.device)
    for scale in (1.0, 1 / 2**0.5, 0.5):
        scaled = picture
        if scale != 1.0:
            scaled = F.interpolate(
                picture, scale_factor=scale, mode="bilinear", align_corners=False
            )
        total = total + network(scaled).cls
    return F.normalize(total, dim=1)


def mass_mask(attention: Tensor, kept: float) -> Tensor:
    """The patches that hold the share `kept` of each row's mass, as booleans.

    `attention` [..., N] is CLS's attention to the patches (CLS's own entry left out). Patches are
    dropped from the weakest up while the dropped mass is at most 1 - kept (the paper keeps 60%).

    Raises:
        ValueError: `kept` is not in (0, 1].
    """
    if not 0.0 < kept <= 1.0:
        raise ValueError(f"the mass kept is {kept}, not above 0 and at most 1")
    ordered, order = attention.sort(dim=-1)
    cumulated = (ordered / ordered.sum(dim=-1, keepdim=True)).cumsum(dim=-1)
    return (cumulated > 1.0 - kept).gather(-1, order.argsort(dim=-1))


def check_descriptors(network: Backbone, names: Sequence[str]) -> None:
    """Refuses descriptors that `describe` does not know, or that the network does not have.

    Raises:
        ValueError: names the descriptor, and those that are allowed.
    """
    for name in names:
        if name in DESCRIPTORS:
            last_n = 1
        elif (match := _LAST.fullmatch(name)) or (match := _BLOCK.fullmatch(name)):
            last_n = int(match[1])
        else:
            raise ValueError(f"descriptor {name!r} is none of {', '.join(DESCRIPTOR_FORMS)}")
        depth = len(network.blocks) if isinstance(network, VisionTransformer) else 1
        if last_n > depth:
            blocks = f"{depth} block" + ("s" if depth > 1 else "")
            raise ValueError(f"descriptor {name!r}: the network has {blocks}")


def describe(network: Backbone, pictures: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Several descriptors of pictures [B, C, H, W] by one forward, each [B, its length].

    "cls" is the last block's CLS (of a convolutional network the pooled embedding), "mean" the mean
    of the patch tokens, "cls+mean" both one after the other, "copy" the copy descriptor; "lastN"
    the CLS of the last N blocks, oldest first, one after the other (paper, appendix: N = 4), and
    "block-N" that of the N-th block from the end alone. None is normalised.

    Raises:
        ValueError: see `check_descriptors`.
    """
    check_descriptors(network, names)
    counts = [int(m[1]) for name in names if (m := _LAST.fullmatch(name) or _BLOCK.fullmatch(name))]
    most = max(counts, default=1)
    features = network(pictures, last_blocks=most)
    blocks = [block[:, 0] for block in features.blocks] or [features.cls]
    found = {}
    for name in names:
        if name in DESCRIPTORS:
            found[name] = DESCRIPTORS[name](features)
        elif match := _LAST.fullmatch(name):
            found[name] = torch.cat(blocks[-int(match[1]) :], dim=1)
        elif match := _BLOCK.fullmatch(name):
            found[name] = blocks[-int(match[1])]
    return found


def _cls_and_mean(features: Features) -> Tensor:
    return torch.cat((features.cls, features.patches.mean(dim=1)), dim=1)


DESCRIPTORS: Mapping[str, Callable[[Features], Tensor]] = MappingProxyType(
    {
        "cls": lambda features: features.cls,
        "mean": lambda features: features.patches.mean(dim=1),
        "cls+mean": _cls_and_mean,
        "copy": copy_descriptor,
    }
)
DESCRIPTOR_FORMS = (*DESCRIPTORS, "lastN", "block-N")
_LAST, _BLOCK = re.compile(r"last([1-9]\d{0,3})"), re.compile(r"block-([1-9]\d{0,3})")
