"""Patch tokens -> maps: principal components, and likeness to one patch; no model is needed."""

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Point = tuple[float, float]
"""x and y as fractions of the picture's width and height, 0 to 1, from the top left."""


def patch_at(point: Point, grid: tuple[int, int]) -> tuple[int, int]:
    """The row and column of the patch of a grid (rows, columns) that holds a point."""
    x, y = point
    rows, columns = grid
    return min(int(y * rows), rows - 1), min(int(x * columns), columns - 1)


def similarity(tokens: Array, point: Point) -> Array:
    """The cosine of every patch token [h, w, D] to the one at `point`: [1, h, w], in -1 to 1."""
    lengths = np.linalg.norm(tokens, axis=-1, keepdims=True)
    unit = tokens / np.maximum(lengths, 1e-12)
    row, column = patch_at(point, tokens.shape[:2])
    cosines: Array = (unit @ unit[row, column]).clip(-1.0, 1.0)
    return cosines[np.newaxis]


def principal_components(tokens: Array, *, count: int = 3) -> Array:
    """Patch tokens [h, w, D] on their first principal components: [count, h, w], centred.

    A component's sign means nothing, and a solver may give either. Here its largest entry (of D)
    is positive, so that the same picture always gives the same map. Where the tokens vary in fewer
    directions than `count`, the rest are zero.
    """
    h, w, d = tokens.shape
    centred = tokens.reshape(-1, d).astype(np.float64)
    centred -= centred.mean(axis=0)
    # The eigenvectors of the smaller of the two matrices of products tell those of the other.
    if d <= len(centred):
        values, vectors = np.linalg.eigh(centred.T @ centred)
        axes = vectors.T[::-1][:count]
    else:
        values, vectors = np.linalg.eigh(centred @ centred.T)
        axes = vectors.T[::-1][:count] @ centred
        axes /= np.maximum(np.linalg.norm(axes, axis=1, keepdims=True), 1e-12)
    values = values[::-1][:count]
    # Rounding leaves a little where there is nothing.
    axes = axes[values > 1e-9 * max(float((centred**2).sum()), 1e-12)]
    largest = np.abs(axes).argmax(axis=1)
    axes *= np.sign(axes[np.arange(len(axes)), largest])[:, np.newaxis]
    maps = np.zeros((count, h, w), dtype=np.float32)
    maps[: len(axes)] = (centred @ axes.T).T.reshape(-1, h, w)
    return maps
