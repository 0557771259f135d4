"""How many cores this process may use."""

import math
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def available(cgroup: Path = _CGROUP) -> int:
    """Those that it may run on, and no more than its container's share of time is worth.

    A container that is limited to the time of two cores (`docker run --cpus 2`, limits of
    Kubernetes) still sees all of them; a thread for each would spend most of its time stopped.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = _share(cgroup)
    return max(1, min(cores or 1, math.ceil(share) if share else cores or 1))


def _share(cgroup: Path) -> float | None:
    """The limit on processor time, in cores; None where there is none, or none that can be read."""
    whole = cgroup / "cpu.max"  # version 2: "QUOTA PERIOD", or "max PERIOD"
    parts = [cgroup / "cpu" / f"cpu.cfs_{name}_us" for name in ("quota", "period")]  # version 1
    try:
        told = whole.read_text().split() if whole.exists() else [p.read_text() for p in parts]
        quota, period = (float(number) for number in told)
    except (OSError, ValueError):
        return None
    return quota / period if quota > 0 and period > 0 else None
