import threading
import time

import pytest
import torch

from service.torch_threads import Fastest, measured, torch_threads


@pytest.mark.parametrize("fast", [1, 2, 3])
def test_the_fastest_number_of_threads(fast: int) -> None:
    used = set()

    def once(number: int) -> None:
        used.add(number)
        time.sleep(0.0 if number == fast else 0.02)

    assert Fastest(measured(3, once)).now == fast
    assert used == {1, 2, 3}


def test_one_thread_while_several_turn_out_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("service.torch_threads.time.monotonic", lambda: now)

    def slow_ones() -> int:
        """How many it takes."""
        for count in range(1, 100):
            fastest.took(4, 30.0)
            if fastest.now == 1:
                return count
        return 100

    fastest = Fastest({1: 1.0, 2: 0.7, 4: 0.5}, retry_s=5.0)
    for _ in range(100):
        fastest.took(4, 1.4)  # a little slower than one
        fastest.took(2, 9.0)  # a share, beside others
    assert fastest.now == 4
    assert slow_ones() < 4
    for _ in range(9):
        fastest.took(1, 9.0)  # the machine is slow, with one too
    now += 4.9
    assert fastest.now == 1
    now += 0.2
    assert fastest.now == 4
    assert 4 < slow_ones() < 12  # it began anew, and a few are no habit


def test_one_thread_stays_one_thread() -> None:
    fastest = Fastest({1: 1.0, 2: 2.0})
    fastest.took(1, 9.0)
    assert fastest.now == 1


def test_the_caller_keeps_its_number_of_threads() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with torch_threads(1):
            assert torch.get_num_threads() == 1
        with pytest.raises(MemoryError, match="no"), torch_threads(2):
            raise MemoryError("no")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_threads_do_not_change_each_others_number() -> None:
    both, found = threading.Barrier(2, timeout=60), {}

    def work(number: int) -> None:
        with torch_threads(number):
            both.wait()
            found[number] = torch.get_num_threads()
            both.wait()

    threads = [threading.Thread(target=work, args=(number,)) for number in (1, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {1: 1, 3: 3}
