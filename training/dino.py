"""Student, teacher, projection head and the exponential moving average between them."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.vit import VisionTransformer

_INIT_STD = 0.02


class ProjectionHead(nn.Module):
    """The head g of the paper's f = g o h: an MLP, an L2 bottleneck, a weight-normalised layer.

    Args:
        in_dim: size of the backbone's CLS.
        out_dim: K, the number of output dimensions (65536 in the paper).
        hidden_dim: size of the MLP's hidden layers.
        bottleneck_dim: size of the L2-normalised bottleneck.
        layers: linear layers of the MLP, the one into the bottleneck included; 1 is no MLP.
        batch_norm: a BatchNorm after each hidden layer (the paper leaves it out for ViTs).
        norm_last_layer: fixes the last layer's gain g at 1; the paper frees it for ViT-S.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        layers: int = 3,
        batch_norm: bool = False,
        norm_last_layer: bool = True,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"the head has {layers} layers; it needs at least 1")
        if layers == 1:
            self.mlp: nn.Module = nn.Linear(in_dim, bottleneck_dim)
        else:
            steps: list[nn.Module] = []
            width = in_dim
            for _ in range(layers - 1):
                steps.append(nn.Linear(width, hidden_dim))
                if batch_norm:
                    steps.append(nn.BatchNorm1d(hidden_dim))
                steps.append(nn.GELU())
                width = hidden_dim
            steps.append(nn.Linear(width, bottleneck_dim))
            self.mlp = nn.Sequential(*steps)
        self.apply(_init_linear)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)
        self.last_layer.weight_g.requires_grad_(not norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings [B, in_dim] -> outputs before the softmax [B, K]."""
        x = F.normalize(self.mlp(x), dim=-1, p=2)
        outputs: Tensor = self.last_layer(x)
        return outputs


class WeightNormLinear(nn.Module):
    """A linear layer without bias whose rows are g * v / |v| (arXiv 1602.07868).

    Written out, under the original's names `weight_g` and `weight_v`, because the framework's
    function of that name is deprecated and its successor stores other names.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_features, 1))
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        bound = in_features**-0.5  # what nn.Linear starts from
        nn.init.uniform_(self.weight_v, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in] -> [B, out]."""
        weight = self.weight_g * F.normalize(self.weight_v, dim=1, eps=0.0)
        return F.linear(x, weight)


class Network(nn.Module):
    """Backbone and head: what the student and the teacher each are."""

    def __init__(self, backbone: VisionTransformer, head: ProjectionHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        """Crops, each [B, C, H, W] -> outputs [len(crops) * B, K], in the order of the crops.

        Neighbouring crops of one size go through the backbone as one batch.
        """
        groups: list[list[Tensor]] = []
        for crop in crops:
            if groups and groups[-1][0].shape[-2:] == crop.shape[-2:]:
                groups[-1].append(crop)
            else:
                groups.append([crop])
        cls = [self.backbone(torch.cat(group)).cls for group in groups]
        outputs: Tensor = self.head(torch.cat(cls))
        return outputs


def make_teacher(student: Network, teacher: Network) -> Network:
    """Starts the teacher equal to the student; no gradient ever reaches it.

    The teacher stays in training mode, as in the original: a BatchNorm in its head uses its own
    batch's statistics, and its stochastic depth is 0 by construction.
    """
    teacher.load_state_dict(student.state_dict())
    return teacher.requires_grad_(False)


@torch.no_grad()
def update_teacher(teacher: Network, student: Network, momentum: float) -> None:
    """theta_t <- momentum * theta_t + (1 - momentum) * theta_s, parameters only, not buffers."""
    ours: list[Tensor] = list(teacher.parameters())
    theirs: list[Tensor] = list(student.parameters())
    torch._foreach_mul_(ours, momentum)
    torch._foreach_add_(ours, theirs, alpha=1.0 - momentum)


@torch.no_grad()
def clip_each_gradient(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Clips each parameter's gradient to `max_norm` on its own, as the original does.

    This is a quirk kept for parity: not one norm over all parameters, and a coefficient of
    max_norm / (norm + 1e-6). Returns the norm over all gradients before clipping, a scalar tensor.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch._foreach_norm(gradients)
    if max_norm > 0:
        factors = [(max_norm / (norm + 1e-6)).clamp(max=1.0) for norm in norms]
        torch._foreach_mul_(gradients, factors)
    total: Tensor = torch.stack(norms).norm()
    return total


def drop_last_layer_gradient(student: Network) -> None:
    """Freezes the head's last layer for this step: without a gradient optimizers leave it alone."""
    for parameter in student.head.last_layer.parameters():
        parameter.grad = None


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=_INIT_STD)
        nn.init.zeros_(module.bias)
