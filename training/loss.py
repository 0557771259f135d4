"""DINO's loss (arXiv 2104.14294, section 3.1, Algorithm 1), in the paper's symbols.

H(P_t, P_s) = -sum P_t log P_s with P_t = softmax((g_t - C) / tau_t) and P_s = softmax(g_s / tau_s).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.distributed import all_reduce_mean

TEACHER_CROPS = 2


class LossTerms(NamedTuple):
    """Scalars of one step, on this process.

    Attributes:
        loss: the mean cross-entropy over pairs of crops and pictures, in nats.
        teacher_entropy: the mean entropy of the teacher's distributions, in nats, 0 to ln K.
        kl: loss - teacher_entropy = KL(teacher || student), in nats; near 0 means collapse.
    """

    loss: Tensor
    teacher_entropy: Tensor
    kl: Tensor


class DinoLoss(nn.Module):
    """Cross-entropy between the sharpened, centred teacher and the student.

    Args:
        out_dim: K.
        student_temperature: tau_s.
        center_momentum: m in C <- m C + (1 - m) mean(g_t).
    """

    center: Tensor

    def __init__(
        self, out_dim: int, *, student_temperature: float = 0.1, center_momentum: float = 0.9
    ) -> None:
        super().__init__()
        self.student_temperature = student_temperature
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(1, out_dim))

    def forward(self, student: Tensor, teacher: Tensor, teacher_temperature: float) -> LossTerms:
        """Compares each student crop with each teacher crop but its own, then moves the centre.

        Args:
            student: outputs of all crops [(2 + N) * B, K], the two global crops first.
            teacher: outputs of the global crops [2 * B, K].
            teacher_temperature: tau_t.

        For the teacher's crop t and the student's v the loss is the mean over the pairs t != v.
        It is linear in P_t, so that each v needs one log-softmax, and one product with the sum
        of the P_t that it is compared with.
        """
        k = student.shape[-1]
        g_t = teacher.detach().float().reshape(TEACHER_CROPS, -1, k)
        g_s = student.float().reshape(-1, g_t.shape[1], k)
        pairs = TEACHER_CROPS * len(g_s) - TEACHER_CROPS

        log_p_t = F.log_softmax((g_t - self.center) / teacher_temperature, dim=-1)
        p_t = log_p_t.exp()
        log_p_s = F.log_softmax(g_s / self.student_temperature, dim=-1)

        globals_ = -(p_t.flip(0) * log_p_s[:TEACHER_CROPS]).sum()
        locals_ = -(p_t.sum(0) * log_p_s[TEACHER_CROPS:].sum(0)).sum()
        loss = (globals_ + locals_) / (pairs * g_t.shape[1])

        entropy = -(p_t * log_p_t).sum(-1).mean()
        self.update_center(teacher)
        return LossTerms(loss, entropy, loss.detach() - entropy)

    @torch.no_grad()
    def update_center(self, teacher: Tensor) -> None:
        """C <- m C + (1 - m) mean over the batch of all processes; after C was used."""
        mean = all_reduce_mean(teacher.float().mean(dim=0, keepdim=True))
        self.center.mul_(self.center_momentum).add_(mean, alpha=1 - self.center_momentum)
