"""What a run does at an epoch's end to be seen: k-NN, attention maps, its report."""

from pathlib import Path

from torch import nn

from training.attention_maps import attention_maps
from training.config import Recipe
from training.distributed import World
from training.online_knn import OnlineKnn
from training.report import write_report
from training.rows import read_rows
from training.sources import Pictures


class Watch:
    """Measures and draws what the recipe's `knn` and `report` ask for; the run does not notice.

    Args:
        pictures: the run's, of which a few are looked at again and again; None for a stream, which
            cannot be read at random: those of `knn.val` are taken, if there are any.

    Raises:
        DataError, ConfigError: labelled pictures that cannot be used; see `OnlineKnn`.
    """

    def __init__(self, recipe: Recipe, here: World, pictures: Pictures | None) -> None:
        self._recipe, self._here = recipe, here
        self._knn = OnlineKnn(recipe, here) if recipe.knn.train else None
        if pictures is None and self._knn is not None:
            pictures = self._knn.asked
        self._maps = None if pictures is None else attention_maps(recipe, pictures, here)

    def begins(self, teacher: nn.Module) -> None:
        """Before the first step of a new run: keeps what the untrained backbone attends to."""
        if self._maps is not None:
            self._maps.store(0, 0, teacher)

    def epoch_ends(
        self, step: int, epoch: int, *, student: nn.Module, teacher: nn.Module
    ) -> dict[str, float]:
        """After the last step of an epoch, counted from 0; every process must call it.

        Call it before the snapshot of the same step: a run that is killed in between does it again.

        Args:
            step: the steps done.
            student, teacher: their backbones.

        Returns:
            What k-NN measured, for `Monitor.scalars`; empty where it was not due.
        """
        done, last = epoch + 1, epoch + 1 == self._recipe.epochs
        scores: dict[str, float] = {}
        if self._knn is not None and (last or done % self._recipe.knn.every_epochs == 0):
            scores = self._knn.measure(step, epoch, {"student": student, "teacher": teacher})
        every = self._recipe.report.every_epochs
        if last or (every and done % every == 0):
            if self._maps is not None:
                self._maps.store(step, epoch, teacher)
            run_dir = Path(self._recipe.run_dir)
            if self._here.is_main and read_rows(run_dir / "log.csv"):  # else nothing to draw yet
                write_report(run_dir)
        return scores
