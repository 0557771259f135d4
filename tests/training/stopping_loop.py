"""A run that only waits, writes snapshots and stops on signals.

python -m tests.training.stopping_loop RUN_DIR SECONDS_A_STEP
"""

import os
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from training import snapshot
from training.distributed import all_gather_int, world
from training.signals import StopRequest, shield_worker


class Numbers(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 100_000

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.tensor([float(i)])


def start_worker(_: int) -> None:
    shield_worker()


def main(run_dir: Path, step_s: float) -> int:
    with world("cpu") as here, StopRequest() as stop:
        loader = DataLoader(Numbers(), num_workers=2, worker_init_fn=start_worker)
        for step, _ in enumerate(loader, 1):
            if step == 2:
                (run_dir / f"pid-{here.rank}").write_text(str(os.getpid()))
            time.sleep(step_s)
            if stop.wanted():
                steps = all_gather_int(step, here.device)
                if here.is_main:
                    snapshot.save(run_dir, step, {"step": step, "student": {}})
                    print(f"stopped by {stop.name} after steps {steps}", flush=True)
                return stop.status
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), float(sys.argv[2])))
