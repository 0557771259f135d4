"""What SLURM's `srun` tells the tasks that it starts, as torch.distributed wants to know it."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from training.tables import ConfigError

_PORTS = range(12_000, 32_000)  # below those that systems hand out


class SlurmTask(NamedTuple):
    """One of several tasks of a step.

    Attributes:
        rank: of `size` tasks in all, from 0.
        local_rank: among the tasks of this node, from 0.
        address, port: where rank 0 listens.
    """

    rank: int
    size: int
    local_rank: int
    address: str
    port: int


def slurm_task(environment: Mapping[str, str]) -> SlurmTask | None:
    """This process's place in a step of several tasks; None where it is in none.

    `srun` alone sets SLURM_STEP_NUM_TASKS. The script of a batch job and the shell of `salloc`
    also see SLURM_NTASKS, and the script even SLURM_PROCID=0, but are one process each: they must
    not wait for others. MASTER_ADDR and MASTER_PORT go before what is made up here: the step's
    first host, and a port that depends on job and step, the same on every node.

    Raises:
        ConfigError: a variable that is missing, no number, or a list of hosts that is none.
    """
    if _number(environment, "SLURM_STEP_NUM_TASKS", default=1) < 2:
        return None
    size = _number(environment, "SLURM_STEP_NUM_TASKS")
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    job, step = _number(environment, "SLURM_JOB_ID"), _number(environment, "SLURM_STEP_ID", 0)
    port = _PORTS.start + (job * 7 + step) % len(_PORTS)
    return SlurmTask(
        rank=_number(environment, "SLURM_PROCID"),
        size=size,
        local_rank=_number(environment, "SLURM_LOCALID"),
        address=environment.get("MASTER_ADDR") or expand_hosts(hosts)[0],
        port=_number(environment, "MASTER_PORT", port),
    )


def expand_hosts(text: str) -> list[str]:
    """The hosts of a list in SLURM's short form: "a[01-03,7],b" -> a01, a02, a03, a7, b.

    Raises:
        ConfigError: text that is no such list.
    """
    hosts = [host for part in _split(text) for host in _expand(part)]
    if not hosts or not all(re.fullmatch(r"[\w.-]+", host) for host in hosts):
        raise ConfigError(f"SLURM_JOB_NODELIST = {text!r}: must be a list of hosts, a[1-2,5],b")
    return hosts


def _split(text: str) -> list[str]:
    """The parts between the commas that stand outside brackets."""
    return re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+|[\[\]]", text)


def _expand(part: str) -> list[str]:
    match = re.fullmatch(r"([^\[\]]*)\[([\d,-]+)\](.*)", part)
    if match is None:
        return [part]
    start, ranges, rest = match.groups()
    numbers: list[str] = []
    for each in ranges.split(","):
        first, dash, last = each.partition("-")
        last = last if dash else first
        if not first.isdigit() or not last.isdigit():
            return [part]  # brackets stay in the name, and are refused by its letters
        numbers += [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    return [start + number + end for number in numbers for end in _expand(rest)]


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdigit():
        raise ConfigError(f"{name} = {text!r}: must be a whole number in a step of several tasks")
    return int(text)
