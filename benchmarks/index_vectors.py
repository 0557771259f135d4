"""Vectors for `benchmarks/index.py`: as many as wanted, that lie as real ones do, and the check.

The real ones are copy descriptors (CLS and GeM, raw, as a collection of the service holds them) of
pictures, by the model in the repository. A new vector is made of a real one, of the mean of those
near to it, and of what these differ by among themselves:

    new = m + KEPT * (a - m) + SPREAD * sum over j of g_j * (b_j - c_j) / sqrt(2 * PAIRS)

`a` is a random real vector and `m` the mean of it and its NEIGHBOURS nearest; b_j and c_j are
random ones of these, and g_j is drawn from N(0, 1). So new ones lie about `a` as its neighbours do,
in the directions in which these vary and in no others, and what the last term adds to the variance
the second one leaves out (a smoothed bootstrap). Spectrum, clusters and local dimension stay those
of the real ones, which `compare` measures, also where there are ten times as many new ones.
Gaussian noise of 384 dimensions has no near neighbours, and no index would find them.

Each block of BLOCK vectors has its own seed, so the first vectors are the same whatever the number.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

Floats = NDArray[np.float32]

BLOCK = 16_384
NEIGHBOURS = 32
PAIRS = 16
SPREAD = 0.9
KEPT = 0.6
_QUERY_SEED = 2**31  # of a block that no number of vectors reaches


def real_vectors(data: Path, sample: int, cache: Path) -> Floats:
    """Copy descriptors of `sample` pictures out of the archives in `data`: [sample, dimension].

    They are kept in the folder `cache`, under the model's fingerprint and the number.
    """
    from backbone.pretrained import load_model
    from training.distributed import World, choose_device
    from training.evaluation.features import embedder, extract, reading_workers
    from training.sources import every, open_pictures

    archives: Sequence[Path] = sorted(data.glob("*.tar.gz"))
    if not archives:
        raise SystemExit(f"{data} holds no *.tar.gz: give --data FOLDER, or --vectors FILE.npy")
    artifact = load_model("default").artifact
    kept = cache / f"real-{artifact.fingerprint.split(':')[-1][:16]}-{sample}.npy"
    if kept.exists():
        return np.load(kept)
    here = World(0, 1, choose_device("auto"))
    preprocess, multiple = artifact.preprocess, artifact.architecture.patch_size
    found = extract(
        every(open_pictures(archives), sample),
        lambda picture: preprocess.squash(picture, multiple=multiple),
        embedder(artifact, here.device, descriptors=("copy",)),
        here=here,
        workers=reading_workers(here.device),
        title="embedding pictures",
    )["copy"].numpy()
    cache.mkdir(parents=True, exist_ok=True)
    np.save(kept, found)
    return found


class Maker:
    """Makes vectors out of the real ones, see the module.

    Attributes:
        dimension: of the vectors.
    """

    def __init__(self, real: Floats) -> None:
        self._real = np.ascontiguousarray(real, dtype=np.float32)
        self.dimension = real.shape[1]
        unit = normalised(self._real)
        wanted = min(NEIGHBOURS + 1, len(unit))
        _, self._near = faiss.knn(unit, unit, wanted, metric=faiss.METRIC_INNER_PRODUCT)
        self._about = np.empty_like(self._real)
        for start in range(0, len(unit), 1024):
            near = self._near[start : start + 1024]
            self._about[start : start + 1024] = self._real[near].mean(axis=1)

    def block(self, number: int, rows: int = BLOCK) -> Floats:
        """The block of that number, or its first rows: [rows, dimension]."""
        rng = np.random.default_rng([number, len(self._real)])
        made = np.empty((BLOCK, self.dimension), np.float32)
        at = rng.integers(len(self._real), size=BLOCK)
        # The nearest of all is the vector itself.
        near = self._near[at[:, None], rng.integers(1, self._near.shape[1], (BLOCK, 2 * PAIRS))]
        steps = rng.standard_normal((BLOCK, PAIRS), dtype=np.float32) / np.float32(
            np.sqrt(2 * PAIRS)
        )
        weights = np.float32(SPREAD) * np.concatenate([steps, -steps], axis=1)
        for start in range(0, rows, 1024):
            part = slice(start, start + 1024)
            moved = weights[part, None] @ self._real[near[part]]
            own, about = self._real[at[part]], self._about[at[part]]
            made[part] = about + np.float32(KEPT) * (own - about) + moved[:, 0]
        return made[:rows]

    def queries(self, count: int) -> Floats:
        """Vectors that are in no base, made in the same way: [count, dimension], count <= BLOCK."""
        return self.block(_QUERY_SEED, count)

    def write(self, path: Path, count: int) -> Floats:
        """The first `count` vectors in a file, opened for reading: [count, dimension]."""
        shape = (count, self.dimension)
        file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        for start in tqdm(range(0, count, BLOCK), desc="making vectors", file=sys.stderr):
            file[start : start + BLOCK] = self.block(start // BLOCK, min(BLOCK, count - start))
        file.flush()
        del file
        return np.load(path, mmap_mode="r")


def normalised(vectors: Floats) -> Floats:
    """Rows [n, dimension] at unit length, a copy."""
    found = np.array(vectors, dtype=np.float32, order="C")
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return found


def compare(real: Floats) -> dict[str, dict[str, float]]:
    """How vectors made of real ones lie, beside the real ones, at equal numbers.

    "made" is made of all the real ones. "grown" is made of a tenth of them, so it is ten times as
    many as what it was made of, and has the real ones to be compared with.
    """
    tenth = np.random.default_rng(0).permutation(len(real))[: max(2, len(real) // 10)]
    sets = {"real": real}
    for name, base in (("made", real), ("grown", real[np.sort(tenth)])):
        maker = Maker(base)
        blocks = -(-len(real) // BLOCK)
        sets[name] = np.concatenate([maker.block(i) for i in range(blocks)])[: len(real)]
    return {name: described(vectors) for name, vectors in sets.items()}


def described(vectors: Floats, *, near: int = 10, clusters: int = 100) -> dict[str, float]:
    """Spectrum and clustering of vectors [n, dimension] at unit length, about their mean.

    effective_rank: e to the entropy of the covariance's eigenvalues, as parts of their sum;
    top_10, top_50: the part of the sum that so many have.
    cosine: the mean between two of them. near_p10, near_p50, near_p90: quantiles of the distance
    to the 10th neighbour, near_part: the median over the root mean square distance of two vectors.
    local_dimension: the maximum likelihood estimate from 20 neighbours (Levina and Bickel), the
    median. inertia: what k-means of 100 clusters leaves of the variance.
    """
    unit = normalised(vectors)
    mean = unit.mean(axis=0)
    centred = unit - mean
    variance = float(np.square(centred).sum(axis=1).mean())
    values = np.linalg.eigvalsh(np.cov(centred, rowvar=False))[::-1].clip(1e-30)
    parts = values / values.sum()
    asked = centred[:: max(1, len(unit) // 2000)]
    squares, _ = faiss.knn(asked, centred, min(21, len(unit)), metric=faiss.METRIC_L2)
    distances = np.sqrt(np.maximum(squares[:, 1:], 1e-20))
    tenth = distances[:, min(near, distances.shape[1]) - 1]
    logs = np.log(distances[:, -1:] / distances[:, :-1])
    kmeans = faiss.Kmeans(
        unit.shape[1], min(clusters, len(unit) // 2), niter=15, seed=1, min_points_per_centroid=1
    )
    kmeans.train(centred)
    left, _ = kmeans.assign(centred)
    quantiles = np.quantile(tenth, [0.1, 0.5, 0.9])
    return {
        "effective_rank": float(np.exp(-(parts * np.log(parts)).sum())),
        "top_10": float(parts[:10].sum()),
        "top_50": float(parts[:50].sum()),
        "cosine": float(mean @ mean),
        **{f"near_p{p}": float(q) for p, q in zip((10, 50, 90), quantiles, strict=True)},
        "near_part": float(quantiles[1] / np.sqrt(2 * variance)),
        "local_dimension": float(np.median(1 / logs.mean(axis=1).clip(1e-9))),
        "inertia": float(left.mean() / variance),
    }


def true_nearest(vectors: Floats, unit: Floats, k: int, allowed: Any = None) -> Any:
    """The k nearest by cosine of those allowed, by a scan: positions [q, k], -1 where none is."""
    scores = np.full((len(unit), k), -np.inf, np.float32)
    nearest = np.full((len(unit), k), -1, np.int64)
    start = 0
    for rows in in_blocks(vectors):
        own = np.arange(len(rows))
        if allowed is not None:
            own = np.flatnonzero(allowed[start : start + len(rows)])
        if len(own):
            few = min(k, len(own))
            found = faiss.knn(unit, rows[own], few, metric=faiss.METRIC_INNER_PRODUCT)
            scores = np.concatenate([scores, found[0]], axis=1)
            nearest = np.concatenate([nearest, start + own[found[1]]], axis=1)
            order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            scores = np.take_along_axis(scores, order, axis=1)
            nearest = np.take_along_axis(nearest, order, axis=1)
        start += len(rows)
    return nearest


def recall_of(truth: Any, found: Any) -> float:
    """The part of the true neighbours [q, k] that was found; -1 is nobody."""
    hits = sum(
        len(set(t) & set(f) - {-1}) for t, f in zip(as_lists(truth), as_lists(found), strict=True)
    )
    return hits / max(1, int((truth >= 0).sum()))


def as_lists(rows: Any) -> list[list[int]]:
    return rows.tolist() if isinstance(rows, np.ndarray) else rows


def in_blocks(vectors: Floats) -> Any:
    """The vectors at unit length, some at once."""
    for start in range(0, len(vectors), 65_536):
        yield normalised(vectors[start : start + 65_536])
