"""A backbone taken out of a run to be looked at, without the run noticing."""

import torch
from torch import nn

from backbone.architectures import Architecture
from training.sharding import whole


def plain_backbone(
    backbone: nn.Module, architecture: Architecture, device: torch.device
) -> nn.Module:
    """A network of its own around the weights of a student's or teacher's backbone.

    In eval mode and without gradients, neither compiled nor sharded, so that nothing done with it
    changes the run: not its modes, buffers or random state. Weights are shared, not copied, where
    they are not in shards; what is in shards is put together, for which every process must call
    this.
    """
    plain = architecture.skeleton()
    weights = {name: value.to(device) for name, value in whole(backbone.state_dict()).items()}
    plain.load_state_dict(weights, assign=True)
    return plain.eval().requires_grad_(False)
