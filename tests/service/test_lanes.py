import threading
import time

import pytest
import torch
from torch import Tensor

from service.lanes import Lanes


@pytest.mark.parametrize(
    ("threads", "pictures", "expected"),
    [(1, 5, [5]), (2, 1, [1]), (2, 5, [2, 3]), (4, 3, [1, 1, 1]), (4, 8, [2, 2, 2, 2])],
)
def test_parts_in_order(threads: int, pictures: int, expected: list[int]) -> None:
    sizes: list[int] = []

    def compute(part: Tensor) -> Tensor:
        sizes.append(len(part))
        time.sleep(0.01 * float(part[0]))  # the first part ends first; and in reverse below
        return 2 * part

    batch = torch.arange(float(pictures))
    assert torch.equal(Lanes(threads).run(compute, batch), 2 * batch)
    assert torch.equal(Lanes(threads).run(compute, batch.flip(0)), 2 * batch.flip(0))
    assert sorted(sizes) == sorted(2 * expected)


def test_parts_run_side_by_side() -> None:
    both = threading.Barrier(2, timeout=30)

    def compute(part: Tensor) -> Tensor:
        both.wait()
        return part

    Lanes(2).run(compute, torch.zeros(2))


def test_an_error_is_raised_when_all_parts_have_ended() -> None:
    failed, ended = threading.Event(), threading.Event()

    def compute(part: Tensor) -> Tensor:
        if part[0] == 0:
            failed.set()
            raise MemoryError("no")
        assert failed.wait(30)
        time.sleep(0.05)
        ended.set()
        return part

    lanes = Lanes(2)
    with pytest.raises(MemoryError, match="no"):
        lanes.run(compute, torch.arange(2.0))
    assert ended.is_set()
    assert torch.equal(lanes.run(lambda part: part, torch.arange(2.0)), torch.arange(2.0))


@pytest.mark.parametrize("fast", [1, 2])
def test_the_faster_number_of_threads_is_kept(fast: int) -> None:
    lanes, used = Lanes(2), set()

    def compute(part: Tensor) -> Tensor:
        used.add(torch.get_num_threads())
        time.sleep(0.0 if torch.get_num_threads() == fast else 0.02)
        return part

    before = torch.get_num_threads()
    try:
        lanes.measure(lambda: lanes.run(compute, torch.zeros(1)))
        assert used == {1, 2}
        assert lanes.most == fast
    finally:
        torch.set_num_threads(before)


def test_parts_share_the_threads() -> None:
    used: list[int] = []

    def compute(part: Tensor) -> Tensor:
        used.append(torch.get_num_threads())
        return part

    Lanes(4).run(compute, torch.zeros(2))
    assert used == [2, 2]
