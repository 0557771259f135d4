"""Parameters in shards over the processes (FSDP2), and their way into snapshots and back."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from training.distributed import World


def shard(network: nn.Module, here: World) -> None:
    """Leaves each process its part of every parameter; a block's are gathered while it runs.

    Parameters stay float32, and so do the sums of gradients: the numbers are DDP's.
    """
    mesh = init_device_mesh(here.device.type, (here.size,))
    for block in network.get_submodule("backbone").get_submodule("blocks").children():
        fully_shard(block, mesh=mesh)
    # The rest too is given back after a forward: the EMA takes both networks' parts together.
    fully_shard(network, mesh=mesh, reshard_after_forward=True)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of `tensor` alone."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor; the whole where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(state: Any) -> Any:
    """A state dict, nested at will, with every shard put together on the CPU.

    Every process must call it, with the same state.
    """
    if isinstance(state, Mapping):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(whole(value) for value in state)
    return state.full_tensor().cpu() if isinstance(state, DTensor) else state


@torch.no_grad()
def load_weights(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Restores what `whole` made of the network's state dict, sharded as the network is."""
    own = network.state_dict()
    network.load_state_dict({name: _like(own.get(name), value) for name, value in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Restores what `whole` made of the optimizer's state dict, sharded as its parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    entries = {
        i: {
            key: _like(parameters[i], value) if _shaped(parameters[i], value) else value
            for key, value in entry.items()
        }
        for i, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": entries})


def _shaped(parameter: Tensor, value: Any) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _like(own: Tensor | None, value: Tensor) -> Tensor:
    if not isinstance(own, DTensor):
        return value
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)
