"""A store's rows into memory: with the indexes kept on disk as far as these hold, else without."""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index.ann import Ann
from index.cache import CachedIndex, CacheUnusable, read_cache, remove_caches
from index.errors import InvalidSettings
from index.kinds import check_kind
from index.labels import Labels
from index.metadata import MetadataTable
from index.records import prepared
from index.space import Space
from index.store import Store
from index.view import Rows, View

_logger = logging.getLogger(__name__)
_PROGRESS_S = 5.0
_ROWS_AT_ONCE = 16_384


@dataclass(frozen=True, kw_only=True)
class Saved:
    """An index on disk: its generation, how many rows it has, and the recall measured with it."""

    generation: int
    rows: int
    recall: float | None = None


def described(store: Store, space: str, structure: Mapping[str, Any]) -> dict[str, Any]:
    """What an index on disk must be of to be used for this space, with these settings."""
    return {
        "collection": store.uuid,
        "model": store.model,
        "metric": store.metric,
        "dimension": store.spaces[space],
        "structure": dict(structure),
    }


def load(store: Store, *, name: str) -> tuple[View, dict[str, Saved]]:
    """Read the whole store; gives also what is on disk of each space's index, if it was used.

    Whoever calls this sees to it that nobody writes meanwhile.
    """
    live_rows = store.all_rows()
    cached = {}
    for space in store.spaces:
        found = _read_cache(store, name, space, live_rows)
        if found is not None:
            cached[space] = found
    numbers = _all_numbers(live_rows, cached)
    for space in list(cached):  # of indexes that do not go on from one another the longest counts
        own = cached[space].numbers
        if not np.array_equal(own, numbers[: len(own)]):
            _refuse(store, name, space, "it was saved at another time than the others")
            del cached[space]
    live = np.isin(numbers, live_rows, assume_unique=True)
    labels = _labels(store, numbers)
    spaces: dict[str, Space] = {}
    saved: dict[str, Saved] = {}
    for space in store.spaces:
        own_space = Space(dimension=store.spaces[space], metric=store.metric)
        if space in cached:
            opened = _open_ann(store, name, space, cached[space])
            if opened is not None:
                rows = len(cached[space].numbers)
                own_space = Space(
                    dimension=own_space.dimension,
                    metric=own_space.metric,
                    rows=rows,
                    ann=opened,
                    built=rows,
                )
                saved[space] = Saved(
                    generation=cached[space].generation, rows=rows, recall=cached[space].recall
                )
        for vectors in vectors_at(store, name, space, numbers[own_space.rows :]):
            own_space = own_space.extended(vectors)
        spaces[space] = own_space
    view = View(
        numbers=numbers,
        live=live,
        count=len(numbers),
        dead=len(numbers) - len(live_rows),
        spaces=spaces,
        labels=labels,
        table=MetadataTable(),
    )
    return view, saved


def _labels(store: Store, numbers: Rows) -> Labels:
    ids, texts = [""] * len(numbers), [""] * len(numbers)
    for block in store.all_labels():
        at = np.searchsorted(numbers, [row for row, _, _ in block]).tolist()
        for position, (_, record_id, text) in zip(at, block, strict=True):
            ids[position], texts[position] = record_id, text
    labels = Labels()
    labels.extend(ids, texts)
    return labels


def vectors_at(store: Store, name: str, space: str, numbers: Rows) -> Iterator[NDArray[np.float32]]:
    """The vectors of the rows `numbers` (sorted), in blocks; others' for those that are gone.

    Rows may be removed meanwhile, and written above the last of `numbers`. A structure is searched
    past removed rows too, so these must lie as all do: zeros, of which each has the same product
    with everything, drew the links of a graph to them and kept searches from what lay behind.
    """
    others: NDArray[np.float32] | None = None
    next_word = time.monotonic() + _PROGRESS_S
    for start in range(0, len(numbers), _ROWS_AT_ONCE):
        wanted = numbers[start : start + _ROWS_AT_ONCE]
        vectors = np.zeros((len(wanted), store.spaces[space]), np.float32)
        is_gone = np.ones(len(wanted), dtype=np.bool_)
        span = {"after": int(wanted[0]) - 1, "up_to": int(wanted[-1])}
        # A transaction for each piece: a long one would keep SQLite's log from being cut.
        with closing(store.vectors_in(space, **span)) as blocks:
            for rows, block in blocks:
                at = np.minimum(np.searchsorted(wanted, rows), len(wanted) - 1)
                is_wanted = wanted[at] == rows
                vectors[at[is_wanted]] = prepared(block[is_wanted], store.metric)
                is_gone[at[is_wanted]] = False
        if is_gone.any():
            others = _some_vectors(store, space) if others is None else others
            chosen = np.random.default_rng(start).integers(len(others), size=len(wanted))
            vectors[is_gone] = others[chosen[is_gone]]
        yield vectors
        if time.monotonic() > next_word:
            next_word = time.monotonic() + _PROGRESS_S
            _logger.info(
                "collection %r, space %r: read %d of %d vectors",
                *(name, space, start + len(wanted), len(numbers)),
            )


def _some_vectors(store: Store, space: str) -> NDArray[np.float32]:
    """At least one: of an empty store it is zeros, which nobody finds."""
    with closing(store.vectors_in(space)) as blocks:
        for _, vectors in blocks:
            return prepared(vectors, store.metric)
    return np.zeros((1, store.spaces[space]), np.float32)


def _all_numbers(live_rows: Rows, cached: Mapping[str, CachedIndex]) -> Rows:
    """The row at each position: those of the longest index on disk, then what came since."""
    longest = max((each.numbers for each in cached.values()), key=len, default=None)
    if longest is None or not len(longest):
        return live_rows
    return np.concatenate([longest, live_rows[live_rows > longest[-1]]])


def _read_cache(store: Store, name: str, space: str, live_rows: Rows) -> CachedIndex | None:
    try:
        expected = described(store, space, store.settings.structure())
        found = read_cache(store.folder, space, described=expected)
        if found is not None and len(found.numbers):
            if found.numbers[-1] > store.last_number():
                raise CacheUnusable("it is newer than the records, which an older copy took over")
            early = live_rows[live_rows <= found.numbers[-1]]
            if not np.isin(early, found.numbers, assume_unique=True).all():
                raise CacheUnusable("it lacks rows that the collection has")
    except CacheUnusable as error:
        _refuse(store, name, space, str(error))
        return None
    return found


def _open_ann(store: Store, name: str, space: str, cached: CachedIndex) -> Ann | None:
    try:
        ann = Ann.load(
            cached.path,
            check_kind(cached.kind),
            store.metric,
            structure=cached.described["structure"],
            effort=cached.effort,
        )
        if len(ann) != len(cached.numbers):
            raise ValueError(f"it has {len(ann)} vectors for {len(cached.numbers)} rows")
    except (ValueError, InvalidSettings) as error:
        _refuse(store, name, space, str(error))
        return None
    return ann


def _refuse(store: Store, name: str, space: str, reason: str) -> None:
    _logger.warning("collection %r, space %r: building its index anew: %s", *(name, space, reason))
    remove_caches(store.folder, space)
