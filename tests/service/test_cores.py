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
    assert available(tmp_path) == expected


@pytest.mark.parametrize(
    ("quota", "expected"), [("-1", CORES), ("100000", 1), ("120000", min(2, CORES))]
)
def test_a_limit_of_the_older_kind(tmp_path: Path, quota: str, expected: int) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota)
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert available(tmp_path) == expected


def test_without_limits(tmp_path: Path) -> None:
    assert available(tmp_path) == CORES
    assert 1 <= available() <= CORES
