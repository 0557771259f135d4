import threading
import time

import pytest
import torch
from torch import Tensor

from service.lanes import Lanes


@pytest.mark.parametrize(
    ("threads", "pictures", "expected"),
    [
        (1, 5, [5]),
        (2, 1, [1]),
        (2, 5, [2, 3]),
        (4, 5, [2, 1, 1, 1]),
        (4, 3, [1, 1, 1]),
        (4, 8, [2, 2, 2, 2]),
    ],
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


@pytest.mark.parametrize("fast", [1, 2, 3])
def test_the_fastest_number_of_threads(fast: int) -> None:
    lanes, used = Lanes(3), set()

    def compute(part: Tensor) -> Tensor:
        used.add(torch.get_num_threads())
        time.sleep(0.0 if torch.get_num_threads() == fast else 0.02)
        return part

    found = lanes.fastest(lambda most: lanes.run(compute, torch.zeros(1), most=most))
    assert used == {1, 2, 3}
    assert found == fast


def test_one_thread_needs_no_trial() -> None:
    assert Lanes(1).fastest(lambda _: pytest.fail("tried")) == 1


@pytest.mark.parametrize(
    ("pictures", "most", "expected"), [(1, None, 4), (1, 2, 2), (2, None, 2), (2, 1, 1), (9, 4, 1)]
)
def test_parts_share_the_threads(pictures: int, most: int | None, expected: int) -> None:
    used: list[int] = []

    def compute(part: Tensor) -> Tensor:
        used.append(torch.get_num_threads())
        return part

    Lanes(4).run(compute, torch.zeros(pictures), most=most)
    assert set(used) == {expected}


def test_the_caller_keeps_its_number_of_threads() -> None:
    def fail(_: Tensor) -> Tensor:
        raise MemoryError("no")

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for pictures in (1, 2):
            Lanes(2).run(lambda part: part, torch.zeros(pictures), most=1)
            assert torch.get_num_threads() == 3
            with pytest.raises(MemoryError):
                Lanes(2).run(fail, torch.zeros(pictures))
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
