"""DINO's loss (arXiv 2104.14294, section 3.1, Algorithm 1), in the paper's symbols.

H(P_t, P_s) = -sum P_t log P_s with P_t = softmax((g_t - C) / tau_t) and P_s = softmax(g_s / tau_s).
The paper's ablations replace parts of it: what makes P_t (`targets`), or H by a squared distance.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from training.distributed import Reduction, all_reduce_max, all_reduce_sum, reduce_mean

TEACHER_CROPS = 2
_AGREEMENT_PICTURES = 16
_CACHED = 2**19  # numbers; 2 MiB of float32


class LossTerms(NamedTuple):
    """Scalars of one step, on this process.

    Attributes:
        loss: the mean cross-entropy over pairs of crops and pictures, in nats.
        teacher_entropy: the mean entropy of the teacher's distributions, in nats, 0 to ln K.
        kl: loss - teacher_entropy = KL(teacher || student), in nats; near 0 means collapse.
        agreement: the share of pictures (of the first 16) whose greatest dimension is the same in
            the teacher's first and the student's second crop.
    """

    loss: Tensor
    teacher_entropy: Tensor
    kl: Tensor
    agreement: Tensor


class DinoLoss(nn.Module):
    """Cross-entropy between the sharpened, centred teacher and the student.

    Args:
        out_dim: K.
        kind: "cross_entropy", or "mse": the squared distance between L2-normalised outputs, without
            softmax, sharpening or centre.
        centering: subtracts the centre C from the teacher's outputs.
        center_momentum: m in C <- m C + (1 - m) mean(g_t).
        assignment: what makes P_t of the teacher's outputs: "softmax" over the dimensions,
            "sinkhorn_knopp" (arXiv 2006.09882), or "batch_softmax", a softmax over the batch that
            is then normalised per picture: one iteration of Sinkhorn-Knopp.
        sinkhorn_iterations: of Sinkhorn-Knopp; 3 in the paper.
        student_temperature: tau_s.
    """

    center: Tensor

    def __init__(
        self,
        out_dim: int,
        *,
        kind: str = "cross_entropy",
        centering: bool = True,
        center_momentum: float = 0.9,
        assignment: str = "softmax",
        sinkhorn_iterations: int = 3,
        student_temperature: float = 0.1,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.centering = centering
        self.center_momentum = center_momentum
        self.iterations = {"softmax": 0, "batch_softmax": 1}.get(assignment, sinkhorn_iterations)
        self.student_temperature = student_temperature
        self.register_buffer("center", torch.zeros(1, out_dim))
        self._means: list[Reduction] = []

    def forward(
        self, student: Tensor, teacher: Tensor, teacher_temperature: float | Tensor
    ) -> LossTerms:
        """Compares each student crop with each teacher crop but its own.

        Args:
            student: outputs of all crops [(2 + N) * B, K], the two global crops first.
            teacher: outputs of the global crops [2 * B, K].
            teacher_temperature: tau_t.

        The batch's part in the next centre starts on its way to the other processes here, and is
        taken in by `update_center`, after the backward pass.
        """
        k = student.shape[-1]
        g_t = teacher.detach().float().reshape(TEACHER_CROPS, -1, k)
        g_s = student.reshape(-1, g_t.shape[1], k)
        self._means.append(reduce_mean(g_t.mean(dim=(0, 1))))
        if self.kind == "mse":
            loss, entropy = self._squared_distance(g_s, g_t), g_t.new_zeros(())
        else:
            p_t, entropy = self.targets(g_t, teacher_temperature)
            loss = cross_entropy(g_s, p_t, self.student_temperature)
        first = slice(_AGREEMENT_PICTURES)
        same = g_t[0, first].argmax(-1) == g_s[1, first].detach().argmax(-1)
        return LossTerms(loss, entropy, loss.detach() - entropy, same.float().mean())

    @torch.no_grad()
    def targets(self, g_t: Tensor, teacher_temperature: float | Tensor) -> tuple[Tensor, Tensor]:
        """P_t of the teacher's outputs [2, B, K], float32, and its mean entropy."""
        center = self.center if self.centering else torch.zeros_like(self.center)
        flat = g_t.flatten(0, 1)
        if self.iterations:
            scores = (flat - center) / teacher_temperature
            log_p = sinkhorn_knopp(scores, iterations=self.iterations)
            p = log_p.exp()
            entropy = -(p * log_p).sum()
        else:
            p, parts = torch.empty_like(flat), []
            for rows in _chunks(flat):
                log_p = F.log_softmax((flat[rows] - center).div_(teacher_temperature), dim=-1)
                torch.exp(log_p, out=p[rows])
                parts.append(torch.dot(p[rows].flatten(), log_p.flatten()))
            entropy = -torch.stack(parts).sum()
        return p.reshape(g_t.shape), entropy / len(flat)

    def _squared_distance(self, g_s: Tensor, g_t: Tensor) -> Tensor:
        unit_s, unit_t = F.normalize(g_s.float(), dim=-1), F.normalize(g_t, dim=-1)
        others = torch.cat((unit_t.flip(0), unit_t.sum(0).expand(len(g_s) - 2, -1, -1)))
        pairs = TEACHER_CROPS * len(g_s) - TEACHER_CROPS
        # |a - b|^2 = 2 - 2 ab between unit vectors, and ab is linear in b, as the cross-entropy.
        return 2.0 - 2.0 * (unit_s * others).sum() / (pairs * g_s.shape[1])

    @torch.no_grad()
    def update_center(self, skip: Tensor | None = None) -> None:
        """C <- m C + (1 - m) mean of the step's batches on all processes; after C was used.

        Args:
            skip: a tensor that is above 0 where this step does not count: C stays.
        """
        mean = torch.stack([reduction.wait() for reduction in self._means]).mean(0)
        self._means.clear()
        moved = self.center * self.center_momentum + mean * (1 - self.center_momentum)
        self.center.copy_(moved if skip is None else torch.where(skip > 0, self.center, moved))


def cross_entropy(g_s: Tensor, p_t: Tensor, student_temperature: float) -> Tensor:
    """The mean of H(P_t, P_s) over pictures and pairs of different crops, a scalar.

    Args:
        g_s: the student's outputs [2 + N, B, K].
        p_t: the teacher's distributions [2, B, K], float32.

    H is linear in P_t, so that a crop of the student needs one softmax, and one product with the
    sum of the P_t that it is compared with.
    """
    loss: Tensor = _CrossEntropy.apply(g_s, p_t, student_temperature)
    return loss


class _CrossEntropy(torch.autograd.Function):
    """`cross_entropy` with the gradient written out, made in the forward pass.

    d/dg_s = (n softmax(g_s / tau_s) - sum of P_t) / tau_s, for n the number of P_t. A general
    backward would keep and pass over [2 + N, B, K] many times; this one holds it once, and works
    on pieces that stay in the processor's cache.
    """

    @staticmethod
    def forward(ctx: Any, g_s: Tensor, p_t: Tensor, temperature: float) -> Tensor:
        pairs = TEACHER_CROPS * len(g_s) - TEACHER_CROPS
        scale = 1.0 / (pairs * g_s.shape[1])
        # fp16 cannot hold such small numbers before the loss's scale has multiplied them.
        wide = torch.float32 if g_s.dtype == torch.float16 else g_s.dtype
        gradient = torch.empty_like(g_s, dtype=wide)
        both = p_t.sum(0) if len(g_s) > TEACHER_CROPS else None
        losses = []
        for crop, g in enumerate(g_s):
            p, n = (p_t[1 - crop], 1) if both is None or crop < TEACHER_CROPS else (both, 2)
            for rows in _chunks(g):
                log_p_s = F.log_softmax(g[rows].float() / temperature, dim=-1)
                losses.append(torch.dot(p[rows].flatten(), log_p_s.flatten()))
                part = log_p_s.exp_().mul_(n * scale / temperature)
                gradient[crop, rows] = part.sub_(p[rows], alpha=scale / temperature)
        ctx.save_for_backward(gradient)
        ctx.dtype = g_s.dtype
        return -torch.stack(losses).sum() * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad).to(ctx.dtype), None, None


def _chunks(rows: Tensor) -> list[slice]:
    """Slices over the rows of [B, K]: of a size for the cache on the CPU, else one for all."""
    count, k = rows.shape
    size = max(1, _CACHED // k) if rows.device.type == "cpu" else count
    return [slice(start, start + size) for start in range(0, count, size)]


@torch.no_grad()
def sinkhorn_knopp(scores: Tensor, *, iterations: int) -> Tensor:
    """log P of Sinkhorn-Knopp (arXiv 2006.09882) over the batch of all processes.

    Each iteration makes the dimensions' sums over all pictures equal, then each picture's sum 1.
    Done on logarithms, so that low temperatures cannot overflow.

    Args:
        scores: outputs over temperature, [pictures, K], float32.
    """
    for _ in range(iterations):
        top = all_reduce_max(scores.amax(dim=0))
        sums = all_reduce_sum((scores - top).exp().sum(dim=0))
        scores = F.log_softmax(scores - (top + sums.log()), dim=1)
    return scores
