"""How many cores this process may use."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

BRIEF_WAITS = {
    "GOMP_SPINCOUNT": "5000",  # GNU's OpenMP, which torch brings along: a fraction of a millisecond
    "OMP_WAIT_POLICY": "ACTIVE",  # if its threads are more than the cores: a fifth of that
    "KMP_BLOCKTIME": "0",  # Intel's and LLVM's, in milliseconds
}
"""Environment that lets threads which share a product spin for a moment before they sleep.

By default they spin for milliseconds, and take the cores from threads that decode and from other
processes; those that sleep at once have to be woken for each of a forward pass's many products.
Where an operator sets one of these, none is set for them.
"""

_CGROUP = Path("/sys/fs/cgroup")
_GROUPS = Path("/proc/self/cgroup")


def available(cgroup: Path = _CGROUP, groups: Path = _GROUPS) -> int:
    """Those that it may run on, and no more than its container's share of time is worth.

    A container that is limited to the time of two cores (`docker run --cpus 2`, limits of
    Kubernetes) still sees all of them; a thread for each would spend most of its time stopped.

    Args:
        cgroup: where the system shows its control groups.
        groups: the file that names those of this process.

    Returns:
        At least 1; a share of 1.5 cores counts as 2.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    shares = [share for folder in _folders(cgroup, groups) if (share := _share(folder))]
    return max(1, min([cores or 1, *(math.ceil(share) for share in shares)]))


def _folders(cgroup: Path, groups: Path) -> Iterator[Path]:
    """Those of the process's group and of all groups around it, of both versions of cgroups."""
    told = groups.read_text().splitlines() if groups.exists() else []
    for line in told:
        _, controllers, path = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):
            root = cgroup / "cpu" if controllers else cgroup
            own = root / path.lstrip("/")
            yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(root))
    yield from (cgroup, cgroup / "cpu")  # in a container the path may be the host's


def _share(folder: Path) -> float | None:
    """The limit on processor time, in cores; None where there is none, or none that can be read."""
    whole = folder / "cpu.max"  # version 2: "QUOTA PERIOD", or "max PERIOD"
    parts = [folder / f"cpu.cfs_{name}_us" for name in ("quota", "period")]  # version 1
    try:
        told = whole.read_text().split() if whole.exists() else [p.read_text() for p in parts]
        quota, period = (float(number) for number in told)
    except (OSError, ValueError):
        return None
    return quota / period if quota > 0 and period > 0 else None
