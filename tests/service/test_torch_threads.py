import threading
import time

import pytest
import torch

from service.torch_threads import fastest, torch_threads


@pytest.mark.parametrize("fast", [1, 2, 3])
def test_the_fastest_number_of_threads(fast: int) -> None:
    used = set()

    def once(number: int) -> None:
        used.add(number)
        time.sleep(0.0 if number == fast else 0.02)

    assert fastest(3, once) == fast
    assert used == {1, 2, 3}


def test_one_thread_needs_no_trial() -> None:
    assert fastest(1, lambda _: pytest.fail("tried")) == 1


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
