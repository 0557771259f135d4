"""J and F of masks whose values follow from counting."""

import math

import numpy as np
import pytest

from training.evaluation.segmentation_measures import (
    Mask,
    boundary,
    boundary_f,
    dilate,
    jaccard,
    statistics,
)

SHAPE = (60, 80)  # the diagonal is 100, so that boundaries match within ceil(.8) = 1 pixel


def rectangle(top: int, left: int, height: int, width: int, shape: tuple[int, int] = SHAPE) -> Mask:
    mask = np.zeros(shape, dtype=np.bool_)
    mask[top : top + height, left : left + width] = True
    return mask


EMPTY = np.zeros(SHAPE, dtype=np.bool_)


def test_identical_masks() -> None:
    mask = rectangle(10, 10, 20, 30)
    assert (jaccard(mask, mask), boundary_f(mask, mask)) == (1.0, 1.0)


def test_both_empty_is_right() -> None:
    assert (jaccard(EMPTY, EMPTY), boundary_f(EMPTY, EMPTY)) == (1.0, 1.0)


def test_one_empty_is_wrong() -> None:
    mask = rectangle(10, 10, 20, 30)
    for pair in ((mask, EMPTY), (EMPTY, mask)):
        assert (jaccard(*pair), boundary_f(*pair)) == (0.0, 0.0)


def test_disjoint_masks() -> None:
    pair = rectangle(5, 5, 10, 10), rectangle(5, 40, 10, 10)
    assert (jaccard(*pair), boundary_f(*pair)) == (0.0, 0.0)


def test_a_shift_by_one_pixel_is_within_the_tolerance() -> None:
    pair = rectangle(10, 10, 8, 8), rectangle(10, 11, 8, 8)
    assert jaccard(*pair) == pytest.approx(7 / 9)
    assert boundary_f(*pair) == 1.0


def test_a_shift_by_four_pixels() -> None:
    # A boundary is the outline of 9 x 9 pixels, 32 of them. Of the upper and the lower side, 6 each
    # lie on the other outline's or beside its corner; and 2 of the right side touch those.
    pair = rectangle(10, 10, 8, 8), rectangle(10, 14, 8, 8)
    assert jaccard(*pair) == pytest.approx(4 / 12)
    assert boundary_f(*pair) == pytest.approx(14 / 32)


def test_precision_and_recall_differ() -> None:
    small, large = rectangle(20, 20, 8, 8), rectangle(20, 20, 8, 24)
    # All but the small one's right side lie on the large outline, 32 - 7 pixels, and 2 of that side
    # touch it. Of the large one's 64 pixels there are 25, and 2 that touch the small one's corners.
    precision, recall = 27 / 32, 27 / 64
    expected = 2 * precision * recall / (precision + recall)
    assert boundary_f(small, large) == pytest.approx(expected)
    assert boundary_f(large, small) == pytest.approx(expected)
    assert jaccard(small, large) == pytest.approx(1 / 3)


def test_the_tolerance_is_a_disk_of_eight_pixels_at_480p() -> None:
    shape = (480, 854)
    assert math.ceil(0.008 * math.hypot(*shape)) == 8
    dot = rectangle(100, 100, 1, 1, shape)  # its boundary is a square of 2 x 2 pixels
    # 9 below: two of the four pixels have one exactly 8 away. 7 and 7: the nearest is 6 and 6 away,
    # within a square of 8 but not within a disk.
    assert boundary_f(dot, rectangle(109, 100, 1, 1, shape)) == pytest.approx(0.5)
    assert boundary_f(dot, rectangle(107, 107, 1, 1, shape)) == 0.0
    assert boundary_f(dot, rectangle(106, 106, 1, 1, shape)) > 0.0


def test_the_border_of_the_frame_is_no_boundary() -> None:
    assert not boundary(np.ones(SHAPE, dtype=np.bool_)).any()
    half = rectangle(0, 0, 60, 40)
    assert np.array_equal(boundary(half), rectangle(0, 39, 60, 1))


def test_boundary_of_a_rectangle_is_the_outline_above_and_left_of_its_edges() -> None:
    found = boundary(rectangle(10, 10, 8, 6))
    outline = rectangle(9, 9, 9, 7) & ~rectangle(10, 10, 7, 5)
    assert np.array_equal(found, outline)


def test_dilation_at_the_frames_edge_against_distances() -> None:
    rng = np.random.default_rng(0)
    mask = rng.random((17, 23)) < 0.02
    mask[0, 0] = mask[-1, -1] = True
    rows, columns = np.indices(mask.shape)
    near = [(rows - r) ** 2 + (columns - c) ** 2 <= 5**2 for r, c in np.argwhere(mask)]
    assert np.array_equal(dilate(mask, 5), np.any(near, axis=0))


def test_masks_of_two_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[60, 80\] and \[4, 4\]"):
        jaccard(EMPTY, EMPTY[:4, :4])


def test_statistics_over_frames() -> None:
    mean, recall, decay = statistics([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    assert mean == pytest.approx(0.65)
    assert recall == pytest.approx(5 / 8)  # .5 itself is not above one half
    # Ends of the quarters: 1, 2.75, 4.5, 6.25 and 8, rounded to 1, 3, 5, 6 and 8.
    assert decay == pytest.approx(0.9 - 0.4)


def test_quarters_round_halves_up() -> None:
    # Of 7 frames the second end is 2.5, so that the first quarter holds three frames; the fourth
    # starts at 5.5, rounded to 6.
    assert statistics([3, 6, 9, 0, 0, 2, 4]).decay == pytest.approx(6 - 3)


def test_statistics_of_one_frame_and_of_none() -> None:
    assert statistics([0.75]) == (0.75, 1.0, 0.0)
    with pytest.raises(ValueError, match="no frame"):
        statistics([])
