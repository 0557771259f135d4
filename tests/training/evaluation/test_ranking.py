import itertools

import numpy as np
import pytest
import torch

from training.evaluation.ranking import (
    Relevant,
    average_precision,
    micro_average_precision,
    ranked_figures,
)


def test_average_precision_takes_trapezoids() -> None:
    assert average_precision([0, 1], 2) == 1.0
    assert average_precision([1], 1) == pytest.approx((0 + 1 / 2) / 2)
    assert average_precision([0, 3], 4) == pytest.approx((1 + (1 / 3 + 2 / 4) / 2) / 4)


@pytest.mark.parametrize(("ranks", "positives"), [([], 0), ([0, 1], 1)])
def test_average_precision_refuses_impossible_counts(ranks: list[int], positives: int) -> None:
    with pytest.raises(ValueError, match=f"positives is {positives}"):
        average_precision(ranks, positives)


def test_junk_is_passed_over_and_queries_without_positives_are_left_out() -> None:
    ranks = np.array([[5, 5], [0, 0], [1, 1], [2, 2], [3, 3], [4, 4]])
    found = ranked_figures(ranks, [Relevant([0, 2], [5, 1]), Relevant([], [3])], [1, 2])
    assert found.map == 1.0
    assert found.aps == [1.0, None]
    assert found.mp_at == {1: 1.0, 2: 1.0}


def test_published_precision_at_k_ends_at_the_last_positive() -> None:
    ranks = np.arange(10)[:, None]
    found = ranked_figures(ranks, [Relevant([0, 1])], [1, 5])
    assert found.mp_at == {1: 1.0, 5: 0.4}
    assert found.mp_at_as_published == {1: 1.0, 5: 1.0}


def test_nothing_to_be_found_gives_no_figure() -> None:
    found = ranked_figures(np.zeros((1, 1), dtype=np.int64), [Relevant([])], [1])
    assert (found.map, found.mp_at, found.aps) == (None, {1: None}, [None])


def test_as_many_truths_as_queries() -> None:
    with pytest.raises(ValueError, match="2 queries, and truth has 1"):
        ranked_figures(np.zeros((3, 2), dtype=np.int64), [Relevant([0])])


def test_micro_average_precision_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.5], [0.8, 0.1]])
    correct = torch.tensor([[True, False], [False, True]])
    # By falling score: right, wrong, wrong, right.
    assert micro_average_precision(scores, correct, 2) == pytest.approx((1 + 2 / 4) / 2)
    assert micro_average_precision(scores, correct, 4) == pytest.approx((1 + 2 / 4) / 4)


def test_micro_average_precision_does_not_depend_on_the_order_of_ties() -> None:
    scores, correct = [0.7, 0.5, 0.5, 0.5, 0.2], [False, True, False, True, True]
    expected = (2 * 2 / 4 + 3 / 5) / 3
    for order in itertools.permutations(range(5)):
        shuffled = (
            torch.tensor([scores[i] for i in order]),
            torch.tensor([correct[i] for i in order]),
        )
        assert micro_average_precision(*shuffled, 3) == pytest.approx(expected)


def test_micro_average_precision_refuses_impossible_counts() -> None:
    with pytest.raises(ValueError, match="positives is 0; 1 were found"):
        micro_average_precision(torch.ones(1), torch.tensor([True]), 0)
