"""Steps whose gradients were not finite: told late, so that the host never waits for the device."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from training.distributed import World
from training.monitors import TrainingDiverged

IN_A_ROW = 5
IN_A_ROW_FP16 = 25  # the loss scale starts at 2**16 and is halved by each


class SkippedSteps:
    """Counts skipped steps, keeps their pictures' names, and stops a run that makes nothing else.

    A step's flag is looked at when the next step is already under way. Names go to
    `skipped_steps.rankN.jsonl` in the run's folder, a line each: {"step": .., "names": [..]}.

    Args:
        in_a_row: how many skipped steps one after another stop the run.
        start: steps that the run has done; what is listed of later ones will be done again.

    Attributes:
        count: the skipped steps that are known of.
    """

    def __init__(self, run_dir: Path, here: World, *, in_a_row: int, start: int = 0) -> None:
        self._path = run_dir / f"skipped_steps.rank{here.rank}.jsonl"
        self._limit = in_a_row
        self._row = 0
        self._pending: tuple[int, Tensor, torch.cuda.Event | None, Sequence[str]] | None = None
        self.count = _keep_until(self._path, start)

    def saw(self, step: int, skipped: Tensor, names: Sequence[str]) -> None:
        """Takes the flag of a step (a scalar on the device), and looks at the one before.

        Raises:
            TrainingDiverged: too many in a row, on every process alike.
        """
        flag, event = skipped.to("cpu", non_blocking=True), None
        if skipped.is_cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self.look()
        self._pending = (step, flag, event, names)

    def look(self) -> None:
        """Waits for the last flag that was taken, and counts it; raises as `saw` does."""
        if self._pending is None:
            return
        step, flag, event, names = self._pending
        self._pending = None
        if event is not None:
            event.synchronize()
        if flag.item() == 0:
            self._row = 0
            return
        self.count += 1
        self._row += 1
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step + 1, "names": list(names)}) + "\n")
        if self._row >= self._limit:
            raise TrainingDiverged(
                f"{self._row} steps in a row had gradients that are not finite, the last of them "
                f"step {step + 1}; their pictures are in {self._path}, and the weights are those "
                "from before. Lower optimizer.lr, lengthen optimizer.warmup_epochs, set "
                "optimizer.clip_grad = 3.0, or take precision = 'fp32'"
            )


def _keep_until(path: Path, start: int) -> int:
    """Drops the lines of steps after `start`, and one that was cut short; counts the rest."""
    if not path.exists():
        return 0
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    kept = [line for line in whole if json.loads(line)["step"] <= start]
    if len(kept) < len(lines):
        path.write_text("".join(kept), encoding="utf-8")
    return len(kept)
