import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from index.ann import Ann, faiss, search_block
from index.effort import candidates
from index.errors import InvalidSettings
from index.kinds import IndexSettings, Kind, Metric
from index.one_query import Live

METRICS: list[Metric] = ["cosine", "ip", "l2"]
KINDS: list[Kind] = ["hnsw", "ivf_sq8", "ivf_pq", "mapped"]
SETTINGS = IndexSettings(hnsw_m=8, lists=12, pq_bytes=8)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """OpenMP's threads spin while they wait for each other, for long where cores are taken."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


def clustered(count: int, *, seed: int = 0, dimension: int = 32, metric: str = "cosine") -> Any:
    """Rows in 40 clusters, of unit length for the cosine."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((40, dimension))
    rows = centres[random.integers(40, size=count)]
    rows = rows + 0.3 * random.standard_normal((count, dimension))
    if metric == "cosine":
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float32)


def exact(queries: Any, rows: Any, metric: str) -> Any:
    """Scores [queries, rows] in float64: greater is nearer."""
    wide, others = queries.astype(np.float64), rows.astype(np.float64)
    if metric == "l2":
        return -((wide[:, None] - others[None]) ** 2).sum(axis=2)
    return wide @ others.T


def trained(kind: Kind, metric: Metric, rows: Any, *, settings: IndexSettings = SETTINGS) -> Ann:
    ann = Ann.train(kind, rows.shape[1], metric, settings, rows, expected_rows=len(rows))
    assert ann.add(rows) == len(rows)
    return ann


def recall(found: Any, truth: Any, k: int) -> float:
    best = np.argsort(-truth, axis=1)[:, :k]
    hits = [len(set(a.tolist()) & set(b.tolist())) for a, b in zip(found, best, strict=True)]
    return sum(hits) / (k * len(hits))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("queries", [1, 37])
def test_blocks_are_searched_exactly(metric: Metric, queries: int) -> None:
    rows = clustered(300, metric=metric)
    asked = clustered(queries, seed=1, metric=metric)
    truth = exact(asked, rows, metric)
    scores, positions = search_block(asked, rows, 7, metric)
    np.testing.assert_array_equal(positions, np.argsort(-truth, axis=1)[:, :7])
    np.testing.assert_allclose(scores, -np.sort(-truth, axis=1)[:, :7], atol=2e-4)
    allowed = np.zeros(300, np.bool_)
    allowed[10:14] = True
    scores, positions = search_block(asked, rows, 7, metric, allowed)
    best = 10 + np.argsort(-truth[:, 10:14], axis=1)
    np.testing.assert_array_equal(positions[:, :4], best)
    assert (positions[:, 4:] == -1).all()
    assert np.isneginf(scores[:, 4:]).all()


def test_near_duplicates_far_from_the_origin_are_told_apart() -> None:
    """|x|² + |y|² - 2xy would be nothing but rounding here."""
    rows = (1000 + np.arange(50, dtype=np.float32)[:, None] / 64) * np.ones((1, 8), np.float32)
    _, positions = search_block(rows, rows, 1, "l2")
    np.testing.assert_array_equal(positions[:, 0], np.arange(50))


def test_blocks_without_rows_or_queries() -> None:
    rows = clustered(5)
    scores, positions = search_block(rows, rows[:0], 3, "ip")
    assert (positions == -1).all()
    assert np.isneginf(scores).all()
    assert search_block(rows[:0], rows, 3, "l2")[1].shape == (0, 3)
    assert (search_block(rows, rows, 9, "ip")[1][:, 5:] == -1).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_nearest_are_found(kind: Kind, metric: Metric) -> None:
    rows = clustered(3000, metric=metric)
    asked = clustered(40, seed=1, metric=metric)
    truth = exact(asked, rows, metric)
    ann = trained(kind, metric, rows)
    scores, positions = ann.search(asked, candidates(kind, 10), effort=ann.efforts[-1])
    assert recall(positions, truth, 10) >= (0.8 if kind == "ivf_pq" else 0.97)
    assert (np.diff(scores, axis=1) <= 0).all()
    assert ann.holds_vectors is (kind in ("hnsw", "mapped"))
    if ann.holds_vectors:
        np.testing.assert_allclose(
            scores, np.take_along_axis(truth, positions, axis=1), rtol=1e-4, atol=1e-3
        )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.5, 0.05, 0.001])
def test_k_allowed_rows_are_found_where_there_are_k(
    kind: Kind, metric: Metric, share: float
) -> None:
    rows = clustered(3000, metric=metric)
    asked = clustered(10, seed=1, metric=metric)
    # What is allowed is as far from the queries as can be.
    far = np.argsort(exact(asked, rows, metric).max(axis=0))[: int(3000 * share)]
    allowed = np.zeros(3000, np.bool_)
    allowed[far] = True
    ann = trained(kind, metric, rows)
    scores, positions = ann.search(asked, 10, allowed=allowed, effort=ann.efforts[-1])
    there = min(10, len(far))
    assert (positions[:, :there] >= 0).all()
    assert allowed[positions[:, :there]].all()
    assert all(len(set(found[:there].tolist())) == there for found in positions)
    assert (positions[:, there:] == -1).all()
    assert np.isneginf(scores[:, there:]).all()
    truth = exact(asked, rows, metric)
    truth[:, ~allowed] = -np.inf
    assert recall(positions[:, :there], truth, there) >= (0.2 if kind == "ivf_pq" else 0.9)


@pytest.mark.parametrize("kind", KINDS)
def test_all_rows_can_be_asked_for(kind: Kind) -> None:
    rows = clustered(400)
    ann = trained(kind, "cosine", rows, settings=IndexSettings(hnsw_m=4, lists=9, pq_bytes=8))
    _, positions = ann.search(rows[:3], 500)
    for found in positions:
        assert sorted(found[:400].tolist()) == list(range(400))
        assert (found[400:] == -1).all()
    nobody = np.zeros(400, np.bool_)
    assert (ann.search(rows[:3], 5, allowed=nobody)[1] == -1).all()
    # A shorter mask leaves out what is behind its end.
    _, positions = ann.search(rows[:3], 500, allowed=np.ones(7, np.bool_))
    assert all(sorted(found[:8].tolist()) == [-1, *range(7)] for found in positions)
    assert ann.search(rows[:0], 5)[0].shape == (0, 5)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_saved_answers_the_same_and_goes_on(
    kind: Kind, metric: Metric, tmp_path: Path
) -> None:
    rows = clustered(2000, metric=metric)
    asked = clustered(20, seed=1, metric=metric)
    ann = trained(kind, metric, rows)
    ann.save(tmp_path / "a")
    loaded = Ann.load(tmp_path / "a", kind, metric, structure=ann.structure, effort=ann.effort)
    assert (len(loaded), loaded.dimension, loaded.effort) == (2000, 32, ann.effort)
    for mine, theirs in zip(ann.search(asked, 10), loaded.search(asked, 10), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    more = clustered(500, seed=2, metric=metric)
    if kind == "mapped":
        assert not loaded.can_add
        with pytest.raises(ValueError, match="cannot be added to"):
            loaded.add(more)
        return
    assert loaded.add(more) == 500
    asked = more[:40]
    _, positions = loaded.search(asked, candidates(kind, 1), effort=loaded.efforts[-1])
    truth = exact(asked, np.concatenate([rows, more]), metric)
    assert recall(positions, truth, 1) >= 0.9


def test_files_that_are_something_else_are_refused(tmp_path: Path) -> None:
    rows = clustered(500)
    path = tmp_path / "a"
    trained("hnsw", "cosine", rows).save(path)
    with pytest.raises(ValueError, match="not an index of kind 'ivf_sq8' and metric 'cosine'"):
        Ann.load(path, "ivf_sq8", "cosine", structure={})
    with pytest.raises(ValueError, match="not an index of kind 'hnsw' and metric 'l2'"):
        Ann.load(path, "hnsw", "l2", structure={})
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="a: not an index that faiss can read"):
        Ann.load(path, "hnsw", "cosine", structure={})
    with pytest.raises(OSError, match="No such file"):
        trained("hnsw", "cosine", rows).save(tmp_path / "none" / "a")


def test_what_cannot_be_trained() -> None:
    rows = clustered(300)
    with pytest.raises(ValueError, match="kind must be one with a structure, got 'flat'"):
        Ann.train("flat", 32, "ip", SETTINGS, rows, 300)
    with pytest.raises(ValueError, match="at least 256 rows, got 255"):
        Ann.train("ivf_sq8", 32, "ip", SETTINGS, rows[:255], 300)
    with pytest.raises(ValueError, match="at least 256 rows, got 0"):
        Ann.train("mapped", 32, "ip", SETTINGS, None, 300)
    with pytest.raises(InvalidSettings, match="pq_bytes must divide the dimension, 32, got 7"):
        Ann.train("ivf_pq", 32, "ip", IndexSettings(pq_bytes=7), rows, 300)


@pytest.mark.parametrize("kind", ["ivf_sq8", "ivf_pq", "mapped"])
def test_the_same_sample_gives_the_same_structure(kind: Kind) -> None:
    rows = clustered(1000)
    one, other = (trained(kind, "cosine", rows).search(rows[:50], 5) for _ in range(2))
    np.testing.assert_array_equal(one[1], other[1])
    np.testing.assert_array_equal(one[0], other[0])


def test_many_lists_are_found_through_a_graph() -> None:
    rows = clustered(45_000, dimension=8)
    settings = IndexSettings(lists=1_100)
    ann = Ann.train("ivf_sq8", 8, "cosine", settings, rows, expected_rows=len(rows))
    ann.add(rows[:5000])
    truth = exact(rows[:30], rows[:5000], "cosine")
    _, positions = ann.search(rows[:30], 10, effort=256)
    assert recall(positions, truth, 10) >= 0.8


def test_a_graph_grows_as_if_it_had_never_been_moved() -> None:
    """Its vectors and links are moved to larger places while it grows; nothing is lost."""
    rows = clustered(6000, dimension=16)
    ann = Ann.train("hnsw", 16, "cosine", IndexSettings(hnsw_m=4), None, expected_rows=10)
    before = ann.memory_bytes
    for start in range(0, 6000, 300):
        ann.add(rows[start : start + 300])
        assert len(ann) == start + 300
    scores, positions = ann.search(rows[::10], 1, effort=512)
    found = positions[:, 0] == np.arange(0, 6000, 10)
    assert found.mean() > 0.97
    np.testing.assert_allclose(scores[found, 0], 1, atol=1e-5)
    raw = rows.nbytes
    assert before < raw < ann.memory_bytes < 3 * raw + 6000 * 60


def test_additions_can_be_stopped_and_gone_on_with() -> None:
    rows = clustered(5000)
    ann = Ann.train("hnsw", 32, "cosine", SETTINGS, None, expected_rows=5000)
    calls = iter([False, False, True])
    added = ann.add(rows, should_stop=lambda: next(calls))
    assert 0 < added == len(ann) < 5000
    ann.add(rows[added:])
    assert len(ann) == 5000
    _, positions = ann.search(rows[:200], 1, effort=512)
    assert (positions[:, 0] == np.arange(200)).mean() > 0.97


@pytest.mark.parametrize("kind", ["hnsw", "ivf_sq8"])
def test_searches_run_beside_additions(kind: Kind) -> None:
    rows = clustered(6000)
    ann = Ann.train(kind, 32, "cosine", SETTINGS, rows[:2000], expected_rows=2000)
    ann.add(rows[:2000])
    allowed = np.ones(2000, np.bool_)
    stop, faults, searches = threading.Event(), list[object](), [0]

    def search(seed: int) -> None:
        asked = clustered(4, seed=seed)
        while not stop.is_set():
            for mask in (None, allowed):
                scores, positions = ann.search(asked, 10, allowed=mask)
                if (positions < 0).any() or (np.diff(scores, axis=1) > 0).any():
                    faults.append(positions)
                if mask is not None and (positions >= 2000).any():
                    faults.append(positions)
            searches[0] += 1

    threads = [threading.Thread(target=search, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    ann.add(rows[2000:])
    while searches[0] < 20:
        threads[0].join(0.01)
    stop.set()
    for thread in threads:
        thread.join()
    assert faults == []
    assert len(ann) == 6000


@pytest.mark.parametrize("metric", ["cosine", "ip"])
def test_one_query_finds_what_several_find(metric: Metric) -> None:
    rows, asked = clustered(3000, metric=metric), clustered(50, seed=1, metric=metric)
    ann = trained("hnsw", metric, rows)
    mask = np.random.default_rng(0).random(3000) < 0.8
    live = Live(np.packbits(mask, bitorder="little"), int(mask.sum()))
    for allowed, own in ((None, None), (mask, live)):
        for k in (1, 10):
            scores, positions = ann.search(asked, k, allowed=allowed)
            found = [ann.search_one(query, k, own) for query in asked]
            assert found == [
                (s.tolist(), p.tolist()) for s, p in zip(scores, positions, strict=True)
            ]


def test_one_query_is_left_to_search_where_a_look_at_the_graph_is_not_enough() -> None:
    rows = clustered(300)
    few = np.zeros(300, np.bool_)
    few[:20] = True
    live = Live(np.packbits(few, bitorder="little"), 20)
    graph = trained("hnsw", "cosine", rows)
    assert graph.search_one(rows[0], 5, None) is not None
    assert graph.search_one(rows[0], 301, None) is None
    assert graph.search_one(rows[0], 5, live) is None  # looking at 20 rows is faster
    assert trained("hnsw", "l2", rows).search_one(rows[0], 5, None) is None
    assert trained("ivf_sq8", "cosine", rows).search_one(rows[0], 5, None) is None


def test_many_threads_ask_for_one_query_each_while_a_graph_grows() -> None:
    rows = clustered(4000)
    ann = trained("hnsw", "cosine", rows[:1000])
    wrong, stop = set[int](), threading.Event()

    def ask(first: int) -> None:
        for i in range(first, 10**9, 4):
            found = ann.search_one(rows[i % 1000], 1 + i % 3, None)
            if found is None or found[1][0] != i % 1000:
                wrong.add(i % 1000)
            if stop.is_set():
                return

    threads = [threading.Thread(target=ask, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    ann.add(rows[1000:])
    stop.set()
    for thread in threads:
        thread.join()
    assert len(wrong) <= 5  # a graph has no way to some rows; another thread's hits would be many
