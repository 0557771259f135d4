"""Principal components and likeness of patch tokens, against plain formulas."""

import numpy as np
import pytest

from service.patch_maps import patch_at, principal_components, similarity


def tokens(seed: int, shape: tuple[int, int, int]) -> np.ndarray:
    spread = np.linspace(3.0, 0.1, shape[2])  # directions that no two solvers confuse
    random = np.random.default_rng(seed)
    turned = np.linalg.qr(random.normal(size=(shape[2], shape[2])))[0]
    return (random.normal(size=shape) * spread @ turned + 5.0).astype(np.float32)


@pytest.mark.parametrize("shape", [(6, 9, 16), (3, 4, 40)])
def test_components_are_those_of_the_singular_value_decomposition(
    shape: tuple[int, int, int],
) -> None:
    values = tokens(0, shape)
    found = principal_components(values)
    centred = values.reshape(-1, shape[2]).astype(np.float64)
    centred -= centred.mean(axis=0)
    left, lengths, axes = np.linalg.svd(centred, full_matrices=False)
    expected = (left * lengths)[:, :3].T.reshape(3, *shape[:2])
    for one, other, axis in zip(found, expected, axes, strict=False):
        sign = np.sign(axis[np.abs(axis).argmax()])
        assert np.allclose(one, other * sign, atol=1e-3)
    assert found.dtype == np.float32
    variances = found.reshape(3, -1).var(axis=1)
    assert (np.diff(variances) < 0).all()


def test_the_same_picture_has_the_same_signs() -> None:
    values = tokens(1, (5, 7, 12))
    found = principal_components(values)
    rounding = np.random.default_rng(2).normal(scale=1e-5, size=values.shape).astype(np.float32)
    assert np.allclose(found, principal_components(values + rounding), atol=1e-2)
    assert np.array_equal(found, principal_components(values.copy()))


@pytest.mark.parametrize("shape", [(1, 1, 8), (4, 4, 8), (1, 2, 8)])
def test_where_nothing_varies_there_is_nothing(shape: tuple[int, int, int]) -> None:
    found = principal_components(np.full(shape, 0.3, dtype=np.float32))
    assert found.shape == (3, *shape[:2])
    assert np.abs(found).max() < 1e-5


def test_one_direction_leaves_two_empty() -> None:
    values = np.zeros((1, 5, 4), dtype=np.float32)
    values[0, :, 2] = np.arange(5)
    found = principal_components(values)
    assert np.allclose(found[0], np.arange(5) - 2.0, atol=1e-6)
    assert not found[1:].any()


def test_similarity_is_the_cosine() -> None:
    values = tokens(3, (4, 6, 5))
    (found,) = similarity(values, (0.99, 0.3))  # row 1, column 5
    one = values[1, 5]
    lengths = np.linalg.norm(values, axis=2) * np.linalg.norm(one)
    assert np.allclose(found, values @ one / lengths, atol=1e-6)
    assert found[1, 5] == pytest.approx(1.0, abs=1e-6)


def test_a_token_of_zeros_is_like_nothing() -> None:
    values = np.zeros((1, 2, 3), dtype=np.float32)
    values[0, 1] = 1.0
    assert similarity(values, (0.0, 0.0)).tolist() == [[[0.0, 0.0]]]
    assert similarity(values, (1.0, 1.0))[0, 0] == pytest.approx([0.0, 1.0])


@pytest.mark.parametrize(
    ("point", "expected"),
    [((0.0, 0.0), (0, 0)), ((1.0, 1.0), (2, 4)), ((0.39, 0.34), (1, 1)), ((0.4, 0.33), (0, 2))],
)
def test_the_patch_at_a_point(point: tuple[float, float], expected: tuple[int, int]) -> None:
    assert patch_at(point, (3, 5)) == expected
