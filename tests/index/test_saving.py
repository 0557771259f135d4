import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from index.ann import Ann
from index.collection import Collection
from index.errors import StoreFailed
from index.kinds import IndexSettings, Kind
from index.loading import vectors_at
from tests.index.helpers import fill


def built(kind: Kind, rows: int) -> Ann:
    vectors = np.random.default_rng(0).standard_normal((rows, 8)).astype(np.float32)
    ann = Ann.train(kind, 8, "l2", IndexSettings(), vectors, rows)
    ann.add(vectors)
    return ann


@pytest.mark.parametrize("rows", [10, 500])
def test_an_index_whose_last_bytes_do_not_fit_is_an_error(rows: int) -> None:
    # Into the file that is always full. C's own buffer swallows its refusal of the last 4096 bytes.
    with pytest.raises(OSError, match="No space left on device"):
        built("hnsw", rows).save(Path("/dev/full"))


@pytest.mark.parametrize("kind", ["hnsw", "ivf_sq8", "ivf_pq"])
def test_what_was_saved_answers_alike(tmp_path: Path, kind: Kind) -> None:
    ann = built(kind, 1000)
    ann.save(tmp_path / "ann")
    again = Ann.load(tmp_path / "ann", kind, "l2", structure=ann.structure, effort=ann.effort)
    queries = np.random.default_rng(1).standard_normal((20, 8)).astype(np.float32)
    for ours, theirs in zip(ann.search(queries, 5), again.search(queries, 5), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_rebuild_that_was_asked_for_is_tried_again(
    collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(collection, 50)
    collection.delete(["r1", "r2"])
    assert collection.wait_until_built(timeout_s=60)
    failures = iter([StoreFailed("the disk says no")])

    def read(*arguments: Any) -> Iterator[NDArray[np.float32]]:
        for error in failures:
            raise error
        return vectors_at(*arguments)

    monkeypatch.setattr("index.maintenance.vectors_at", read)
    monkeypatch.setattr("index.builder._AGAIN_S", 0.1)
    collection.rebuild()
    until = time.monotonic() + 60
    while collection.stats().removed:
        assert time.monotonic() < until, "it was not tried again"
        time.sleep(0.02)
    assert next(failures, None) is None
