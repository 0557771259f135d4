"""What stands of a collection, in numbers."""

from collections.abc import Mapping
from dataclasses import dataclass

from index.cache import cache_bytes
from index.kinds import Kind
from index.mirror import Mirror


@dataclass(frozen=True, kw_only=True)
class SpaceStats:
    """One space's index.

    Attributes:
        kind: what answers searches now.
        rows: vectors in memory, of removed records too until these are cleared out.
        pending: those of them that the structure lacks yet; they are searched exactly.
        effort: how hard a search tries (candidates of a graph, lists of an inverted file); 0: flat.
        recall: recall@10 against an exact scan for queries made of records, when last measured.
        generation: how many times the index was saved; saved_rows: what the last one holds.
        memory_bytes: vectors and structure.
    """

    kind: Kind
    dimension: int
    rows: int
    pending: int
    effort: int
    recall: float | None
    generation: int
    saved_rows: int
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Stats:
    """A collection in numbers.

    Attributes:
        count: records.
        removed: rows that are gone and not yet cleared out of the indexes.
        is_building: whether background work is going on, or waits.
        disk_bytes: records (with the log of the latest writes) and saved indexes together.
        memory_bytes: indexes, ids and metadata.
    """

    name: str
    model: str
    metric: str
    count: int
    removed: int
    is_building: bool
    disk_bytes: int
    memory_bytes: int
    spaces: Mapping[str, SpaceStats]


def gather_stats(mirror: Mirror, recall: Mapping[str, float], *, is_building: bool) -> Stats:
    """The numbers as of now; they are quick to come by."""
    view, store = mirror.current(), mirror.store
    spaces = {}
    for name, space in view.spaces.items():
        saved = mirror.saved.get(name)
        spaces[name] = SpaceStats(
            kind="flat" if space.ann is None else space.ann.kind,
            dimension=space.dimension,
            rows=space.rows,
            pending=0 if space.ann is None else space.rows - space.built,
            effort=0 if space.ann is None else space.ann.effort,
            recall=1.0 if space.ann is None else recall.get(name),
            generation=0 if saved is None else saved.generation,
            saved_rows=0 if saved is None else saved.rows,
            memory_bytes=space.memory_bytes,
        )
    rows_bytes = (
        view.numbers.nbytes + view.live.nbytes + view.table.memory_bytes + view.labels.memory_bytes
    )
    return Stats(
        name=mirror.name,
        model=store.model,
        metric=store.metric,
        count=view.count - view.dead,
        removed=view.dead,
        is_building=is_building,
        disk_bytes=store.database.disk_bytes() + cache_bytes(store.folder),
        memory_bytes=rows_bytes + sum(each.memory_bytes for each in spaces.values()),
        spaces=spaces,
    )
