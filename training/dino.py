"""Student, teacher, projection head and the exponential moving average between them."""

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.architectures import Backbone
from training.distributed import all_reduce_sum
from training.sharding import is_sharded, local
from training.weight_norm import WeightNormLinear

_INIT_STD = 0.02


class ProjectionHead(nn.Module):
    """The head g of the paper's f = g o h: an MLP, an L2 bottleneck, a weight-normalised layer.

    Args:
        in_dim: size of the backbone's CLS.
        out_dim: K, the number of output dimensions (65536 in the paper).
        hidden_dim: size of the MLP's hidden layers.
        bottleneck: with the L2-normalised bottleneck and the weight-normalised layer after it; an
            MLP without them ends in K dimensions itself (an ablation of the paper's appendix).
        bottleneck_dim: size of the L2-normalised bottleneck.
        layers: linear layers of the MLP, the one into the bottleneck included; 1 is no MLP.
        activation: "gelu" or "relu".
        batch_norm: a BatchNorm after each hidden layer (the paper leaves it out for ViTs).
        norm_last_layer: fixes the last layer's gain g at 1; the paper frees it for ViT-S.
        predictor: one more MLP (bottleneck, hidden, bottleneck) before the last layer, for the
            student alone: BYOL's asymmetry, which the paper finds DINO does not need.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        hidden_dim: int = 2048,
        bottleneck: bool = True,
        bottleneck_dim: int = 256,
        layers: int = 3,
        activation: str = "gelu",
        batch_norm: bool = False,
        norm_last_layer: bool = True,
        predictor: bool = False,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"the head has {layers} layers; it needs at least 1")
        if predictor and not bottleneck:
            raise ValueError("a predictor stands behind the bottleneck; this head has none")
        between = (lambda: nn.BatchNorm1d(hidden_dim)) if batch_norm else None
        act = {"gelu": nn.GELU, "relu": nn.ReLU}[activation]
        end = bottleneck_dim if bottleneck else out_dim
        self.mlp = _mlp([in_dim, *[hidden_dim] * (layers - 1), end], act, between)
        self.predictor: nn.Module | None = None
        if predictor:
            self.predictor = _mlp([bottleneck_dim, hidden_dim, bottleneck_dim], act, between)
        self.apply(_init_linear)
        self.last_layer: WeightNormLinear | None = None
        if bottleneck:
            self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)
            self.last_layer.weight_g.requires_grad_(not norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings [B, in_dim] -> outputs before the softmax [B, K]."""
        x = self.mlp(x)
        if self.last_layer is None:
            return x
        if self.predictor is not None:
            x = self.predictor(x)
        outputs: Tensor = self.last_layer(F.normalize(x, dim=-1, p=2))
        return outputs

    def last_parameters(self) -> list[nn.Parameter]:
        """Those of the layer that gives the K outputs, which stays frozen at first."""
        if self.last_layer is not None:
            return list(self.last_layer.parameters())
        return list((self.mlp if isinstance(self.mlp, nn.Linear) else self.mlp[-1]).parameters())


class Network(nn.Module):
    """Backbone and head: what the student and the teacher each are."""

    def __init__(self, backbone: Backbone, head: ProjectionHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        """Crops, each [B, C, H, W] -> outputs [len(crops) * B, K], in the order of the crops.

        Neighbouring crops of one size are one batch for the backbone.
        """
        batches = [torch.cat(group) for group in by_size(crops)]
        outputs: Tensor = self.head(self.backbone.forward_cls(batches))
        return outputs


def by_size(crops: Sequence[Tensor]) -> list[list[Tensor]]:
    """Crops, each [B, C, H, W] -> neighbouring ones of one size together."""
    return [list(group) for _, group in groupby(crops, key=lambda crop: crop.shape[-2:])]


def make_teacher(student: Network, teacher: Network) -> Network:
    """Starts the teacher equal to the student; no gradient ever reaches it.

    The teacher stays in training mode, as in the original: a BatchNorm in its head uses its own
    batch's statistics, and its stochastic depth is 0 by construction. It has no predictor.
    """
    weights = student.state_dict()
    teacher.load_state_dict({name: weights[name] for name in teacher.state_dict()})
    return teacher.requires_grad_(False)


@torch.no_grad()
def update_teacher(teacher: Network, student: Network, momentum: float | Tensor) -> None:
    """theta_t <- momentum * theta_t + (1 - momentum) * theta_s, parameters only, not buffers.

    A momentum of 0 copies the student; a scalar on the device is read there.
    """
    theirs = dict(student.named_parameters())
    pairs = [(local(t), local(theirs[name])) for name, t in teacher.named_parameters()]
    ours, students = (list(part) for part in zip(*pairs, strict=True))
    if isinstance(momentum, Tensor):
        moves = torch._foreach_sub(students, ours)
        torch._foreach_mul_(moves, (1.0 - momentum).float())
        torch._foreach_add_(ours, moves)
    elif momentum == 0.0:
        torch._foreach_copy_(ours, students)
    else:
        torch._foreach_lerp_(ours, students, 1.0 - momentum)


@torch.no_grad()
def clip_each_gradient(
    parameters: Iterable[nn.Parameter], max_norm: float, scale: Tensor | None = None
) -> Tensor:
    """Clips each parameter's gradient to `max_norm` on its own, as the original does.

    This is a quirk kept for parity: not one norm over all parameters, and a coefficient of
    max_norm / (norm + 1e-6).

    Args:
        max_norm: 0 does not clip.
        scale: what the loss was multiplied by; gradients are divided by it first.

    Returns:
        The norm over all gradients before clipping, a scalar; not finite where any of them is not.
    """
    found = [p.grad for p in parameters if p.grad is not None]
    gradients = [local(gradient) for gradient in found]
    norms = torch.stack(torch._foreach_norm(gradients))
    if any(is_sharded(gradient) for gradient in found):
        norms = all_reduce_sum(norms.square()).sqrt()
    if scale is not None:
        norms = norms / scale
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0) if max_norm > 0 else torch.ones_like(norms)
    if scale is not None:
        factors = factors / scale
    changes = max_norm > 0 or scale is not None
    if factors.device.type == "cpu":  # looking is free there; a device would have to be waited for
        changes = bool((factors != 1.0).any())
    if changes:
        torch._foreach_mul_(gradients, list(factors.unbind()))
    total: Tensor = norms.norm()
    return total


def drop_last_layer_gradient(student: Network) -> None:
    """Freezes the head's last layer for this step: without a gradient optimizers leave it alone."""
    for parameter in student.head.last_parameters():
        parameter.grad = None


def _mlp(
    widths: Sequence[int], activation: type[nn.Module], norm: Callable[[], nn.Module] | None
) -> nn.Sequential | nn.Linear:
    """Linear layers from width to width, with a norm and an activation between two."""
    linear = [nn.Linear(n_in, n_out) for n_in, n_out in pairwise(widths)]
    if len(linear) == 1:
        return linear[0]
    steps: list[nn.Module] = []
    for layer in linear[:-1]:
        steps += [layer, *([norm()] if norm else []), activation()]
    return nn.Sequential(*steps, linear[-1])


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=_INIT_STD)
        nn.init.zeros_(module.bias)
