"""Linear layers on frozen features, one for each of several learning rates, side by side."""

from collections.abc import Mapping

import torch
from torch import Tensor

from training.distributed import all_reduce_sum

MOMENTUM = 0.9
INITIAL_STD = 0.01
TOP = 5


class LinearProbes:
    """One linear layer for each rate: softmax cross-entropy, SGD with momentum, no weight decay.

    All start from the same weights, N(0, 0.01), and biases of 0. They see the same batches, in
    batched products; none knows of the others, so that each is what it would be alone.

    Attributes:
        weight: [rates, D, classes].
        bias: [rates, classes].
    """

    def __init__(
        self, rates: int, length: int, classes: int, *, seed: int, device: torch.device
    ) -> None:
        drawn = torch.empty(length, classes)
        drawn.normal_(0.0, INITIAL_STD, generator=torch.Generator().manual_seed(seed))
        self.weight = drawn.expand(rates, -1, -1).clone().to(device)
        self.bias = torch.zeros(rates, classes, device=device)
        self._weight_velocity = torch.zeros_like(self.weight)
        self._bias_velocity = torch.zeros_like(self.bias)

    def logits(self, features: Tensor) -> Tensor:
        """Features [B, D] -> [rates, B, classes]."""
        rates = len(self.weight)
        return torch.baddbmm(self.bias[:, None], features.expand(rates, -1, -1), self.weight)

    @torch.no_grad()
    def step(self, features: Tensor, labels: Tensor, lrs: Tensor, *, batch: int) -> Tensor:
        """One step of SGD on a batch that is spread over all processes; every one must call it.

        As `torch.optim.SGD` on the batch's mean loss: v <- 0.9 v + gradient, w <- w - lr v. The
        gradient of softmax cross-entropy is written out: (softmax - one-hot) x features.

        Args:
            features: this process's part [B, D] of the batch, with `labels` [B]; B may be 0.
            lrs: [rates].
            batch: pictures in the whole batch.

        Returns:
            This part's summed loss before the step, [rates].
        """
        log_p = self.logits(features).log_softmax(dim=2)
        truth = labels.expand(len(log_p), -1)[..., None]
        loss = -log_p.gather(2, truth).sum(dim=(1, 2))
        slope = log_p.exp_().scatter_add_(2, truth, torch.full_like(truth, -1.0, dtype=log_p.dtype))
        slope /= batch
        weight = torch.bmm(features.T.expand(len(slope), -1, -1), slope)
        self._weight_velocity.mul_(MOMENTUM).add_(all_reduce_sum(weight))
        self._bias_velocity.mul_(MOMENTUM).add_(all_reduce_sum(slope.sum(dim=1)))
        self.weight.addcmul_(self._weight_velocity, lrs[:, None, None], value=-1)
        self.bias.addcmul_(self._bias_velocity, lrs[:, None], value=-1)
        return loss

    @torch.no_grad()
    def hits(self, features: Tensor, labels: Tensor) -> Tensor:
        """How many of `features` [B, D] each rate ranks right: [rates, 2], top-1 and top-5.

        Where a rate has diverged nothing is right.
        """
        logits = self.logits(features)
        top = logits.topk(min(TOP, logits.shape[2]), dim=2).indices
        found = (top == labels[:, None]) & logits.isfinite().all(dim=2, keepdim=True)
        return torch.stack((found[..., 0].sum(dim=1), found.sum(dim=(1, 2))), dim=1)

    def state(self) -> dict[str, Tensor]:
        """Everything that going on needs."""
        return {
            "weight": self.weight,
            "bias": self.bias,
            "weight_velocity": self._weight_velocity,
            "bias_velocity": self._bias_velocity,
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Puts back what `state` told."""
        for name, own in self.state().items():
            own.copy_(state[name])
