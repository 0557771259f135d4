"""The whitening of copy detection, fitted on a background that is streamed (paper, section 4.2).

`backbone.whitening` is what the service uses: it normalises first and centres its covariance. The
original does neither, and this is the place where that can be compared.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training.distributed import all_reduce_sum

_FLOOR = 1e-5  # of the largest eigenvalue, as in the original


@dataclass(frozen=True, eq=False)
class PcaWhitening:
    """Vectors [B, D] -> whitened, L2-normalised [B, D].

    Attributes:
        mean: [D], of the background.
        matrix: [D, D], V diag(eigenvalue^-.5) of its second moments, all dimensions kept.
    """

    mean: Tensor
    matrix: Tensor

    def __call__(self, vectors: Tensor) -> Tensor:
        """Whitens."""
        return F.normalize((vectors - self.mean) @ self.matrix, dim=1)


class Moments:
    """The count, the sum [D] and the summed outer products [D, D] of vectors, in float64."""

    def __init__(self, dimension: int, device: torch.device) -> None:
        self._sum = torch.zeros(dimension, dtype=torch.float64, device=device)
        self._products = torch.zeros(dimension, dimension, dtype=torch.float64, device=device)
        self._count = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, vectors: Tensor) -> None:
        """Takes in vectors [B, D]."""
        vectors = vectors.double()
        self._count += len(vectors)
        self._sum += vectors.sum(dim=0)
        self._products += vectors.T @ vectors

    def reduce(self) -> None:
        """Adds those of all processes; every process must call it, once."""
        self._count = all_reduce_sum(self._count)
        self._sum = all_reduce_sum(self._sum)
        self._products = all_reduce_sum(self._products)

    def whitening(self, *, centred: bool) -> PcaWhitening:
        """The whitening of what was taken in.

        Args:
            centred: whether the covariance is about the mean. The original's is not (its quirk),
                although it subtracts the mean from the vectors that it whitens.

        Raises:
            ValueError: fewer than 2 vectors were taken in.
        """
        count = float(self._count)
        if count < 2:
            raise ValueError(f"whitening needs at least 2 vectors, not {count:.0f}")
        mean, covariance = self._sum / count, self._products / count
        if centred:
            covariance = covariance - torch.outer(mean, mean)
        values, vectors = torch.linalg.eigh(covariance)
        scale = values.clamp(min=_FLOOR * float(values.max())).rsqrt()
        return PcaWhitening(mean=mean.float(), matrix=(vectors * scale).float())
