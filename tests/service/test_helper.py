"""A second thread for a part of the work, on another core."""

import os
import threading
from collections.abc import Iterator

import pytest

from service.helper import Helper
from tests.service.fakes import PATIENCE_S


@pytest.fixture
def helper() -> Iterator[Helper]:
    made = Helper()
    yield made
    made.close()


def name() -> str:
    return threading.current_thread().name


def test_each_thread_does_its_part(helper: Helper) -> None:
    has_begun = threading.Event()

    def one() -> str:
        has_begun.set()
        return name()

    def other() -> str:
        assert has_begun.wait(PATIENCE_S)  # they are under way at once
        return name()

    for _ in range(3):
        assert helper.both(one, other) == ("helper_0", name())
        has_begun.clear()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core alone")
def test_each_keeps_to_a_core_of_its_own_meanwhile(helper: Helper) -> None:
    before, both_know = os.sched_getaffinity(0), threading.Barrier(2)

    def where() -> set[int]:
        both_know.wait(PATIENCE_S)
        return os.sched_getaffinity(0)

    for _ in range(5):
        helpers, own = helper.both(where, where)
        assert len(own) == 1
        assert helpers == before - own
        assert os.sched_getaffinity(0) == before


def test_cores_that_may_not_be_chosen_are_the_systems_choice(
    helper: Helper, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setaffinity", forbidden)
    assert helper.both(lambda: 1, lambda: 2) == (1, 2)


def test_what_has_not_begun_is_done_by_who_asks(helper: Helper) -> None:
    gate = threading.Event()
    blocking = helper._executor.submit(gate.wait, PATIENCE_S)
    assert helper.both(name, name) == (name(), name())
    gate.set()
    assert blocking.result()
    helper.close()
    assert helper.both(name, name) == (name(), name())


def test_one_at_a_time_has_it(helper: Helper) -> None:
    inner = helper.both(lambda: 1, lambda: helper.both(name, name))
    assert inner == (1, (name(), name()))


@pytest.mark.parametrize("fails", ["one", "other", "both"])
def test_an_error_comes_when_neither_is_under_way(helper: Helper, fails: str) -> None:
    has_begun, has_ended = threading.Event(), threading.Event()

    def one() -> None:
        has_begun.set()
        if fails == "one":
            raise ValueError("of one")
        other_fails.wait(PATIENCE_S)
        has_ended.set()
        if fails == "both":
            raise ValueError("of one")

    def other() -> None:
        assert has_begun.wait(PATIENCE_S)
        other_fails.set()
        if fails != "one":
            raise ValueError("of other")

    other_fails = threading.Event()
    with pytest.raises(ValueError, match="of one" if fails == "one" else "of other"):
        helper.both(one, other)
    assert fails == "one" or has_ended.is_set()
    assert helper.both(lambda: 1, lambda: 2) == (1, 2)
    assert not helper._is_free.locked()
