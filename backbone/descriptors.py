"""Tokens -> vectors and masks: what evaluations and the service compute from a network's output."""

import torch
import torch.nn.functional as F
from torch import Tensor

from backbone.architectures import Backbone
from backbone.vit import Features


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
