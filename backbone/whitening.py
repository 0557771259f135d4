"""Whitening of embeddings: what makes cosines of a weakly trained network tell pictures apart."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_FLOOR = 1e-6  # of the largest eigenvalue; below it a direction is rounding noise


@dataclass(frozen=True, eq=False)
class Whitening:
    """A linear map after which the background's embeddings have no preferred direction.

    Attributes:
        mean: of the L2-normalised background embeddings, [D].
        matrix: V diag(eigenvalue^-.5) of their covariance, all dimensions kept, [D, D]; the
            whitening of the paper's copy detection (section 4.2), here with centred covariance.
    """

    mean: Tensor
    matrix: Tensor

    def apply(self, embeddings: Tensor) -> Tensor:
        """Embeddings [B, D] of any length -> whitened, L2-normalised [B, D]."""
        centred = F.normalize(embeddings, dim=1) - self.mean
        return F.normalize(centred @ self.matrix, dim=1)


def check_enough(count: int, dimension: int) -> None:
    """Whether a whitening of `dimension` numbers can be fitted on `count` embeddings.

    Raises:
        ValueError: fewer than 2 * `dimension`, from which a covariance cannot be told.
    """
    if count < 2 * dimension:
        raise ValueError(
            f"whitening of {dimension} dimensions needs at least {2 * dimension} pictures, "
            f"not {count}; leave the whitening out, or give more"
        )


def fit_whitening(background: Tensor) -> Whitening:
    """The whitening of background embeddings [N, D].

    Raises:
        ValueError: fewer than 2 * D embeddings, from which a covariance cannot be told.
    """
    count, dimension = background.shape
    check_enough(count, dimension)
    normalised = F.normalize(background.double(), dim=1)
    mean = normalised.mean(dim=0)
    centred = normalised - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / count)
    scale = values.clamp(min=_FLOOR * float(values.max())).rsqrt()
    return Whitening(mean=mean.float(), matrix=(vectors * scale).float())
