import os
from pathlib import Path

import pytest

from service.cores import available

CORES = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("100000 100000\n", 1),
        ("50000 100000", 1),
        ("150000 100000", min(2, CORES)),
        ("max 100000", CORES),
        ("99900000 100000", CORES),
        ("0 0", CORES),
        ("", CORES),
        ("nonsense", CORES),
    ],
)
def test_a_limit_of_a_container(tmp_path: Path, told: str, expected: int) -> None:
    (tmp_path / "cpu.max").write_text(told)
    assert available(tmp_path, tmp_path / "groups") == expected


@pytest.mark.parametrize(
    ("quota", "expected"), [("-1", CORES), ("100000", 1), ("120000", min(2, CORES))]
)
def test_a_limit_of_the_older_kind(tmp_path: Path, quota: str, expected: int) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota)
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert available(tmp_path, tmp_path / "groups") == expected


def test_without_limits(tmp_path: Path) -> None:
    assert available(tmp_path, tmp_path / "groups") == CORES
    assert 1 <= available() <= CORES


@pytest.mark.parametrize(
    ("groups", "file"),
    [
        ("0::/system.slice/a.service\n", "system.slice/cpu.max"),
        ("0::/system.slice/a.service\n", "system.slice/a.service/cpu.max"),
        ("3:memory:/a\n2:cpu,cpuacct:/docker/b\n0::/\n", "cpu/docker/b/cpu.cfs_quota_us"),
        ("0::/of/the/host\n", "cpu.max"),
    ],
)
def test_a_limit_of_a_group_around(tmp_path: Path, groups: str, file: str) -> None:
    (tmp_path / "groups").write_text(groups)
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    if file.endswith("cpu.max"):
        (tmp_path / file).write_text("100000 100000")
    else:
        (tmp_path / file).write_text("100000")
        (tmp_path / file).with_name("cpu.cfs_period_us").write_text("100000")
    assert available(tmp_path, tmp_path / "groups") == 1
