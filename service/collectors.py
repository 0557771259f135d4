"""Metrics that are looked up when Prometheus asks: queues, indexes, models, readiness."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from index.collection_set import CollectionSet
from index.errors import CollectionError
from index.statistics import Stats
from service.services import Services
from service.vision import Vision

MOST_COLLECTIONS = 100  # with labels of their own; the rest are summed up
REST = "(others)"  # no collection can have the name
_FRESH_S = 10.0  # sizes on disk are read from the file system no more often


class ServiceCollector(Collector):
    """Whether the service is ready, its models and their queues.

    Args:
        why_not_ready: the reasons; none when it is ready.
        services: None before they are there.
    """

    def __init__(
        self, why_not_ready: Callable[[], Sequence[str]], services: Callable[[], Services | None]
    ) -> None:
        self._why_not_ready = why_not_ready
        self._services = services

    def describe(self) -> Iterable[Metric]:
        """Nothing: names are told by what is collected."""
        return []

    def collect(self) -> Iterator[Metric]:
        """As of now."""
        ready = not self._why_not_ready()
        yield GaugeMetricFamily("dinoscope_ready", "1: /readyz answers 200", value=float(ready))
        services = self._services()
        visions = [] if services is None else services.visions
        yield from _of_models(visions)
        yield from _of_cache(visions)


class IndexCollector(Collector):
    """The collections in numbers, by name for the first `MOST_COLLECTIONS` and in sum for others.

    Reading them costs some system calls a collection, so what is told may be ten seconds old.
    """

    def __init__(self, services: Callable[[], Services | None]) -> None:
        self._services = services
        self._lock = threading.Lock()
        self._stats: list[Stats] = []
        self._damaged = 0
        self._read_at = float("-inf")

    def describe(self) -> Iterable[Metric]:
        """Nothing: names are told by what is collected."""
        return []

    def collect(self) -> Iterator[Metric]:
        """As of the last ten seconds."""
        services = self._services()
        with self._lock:
            if services is not None and time.monotonic() - self._read_at > _FRESH_S:
                self._stats = _read(services.collections)
                self._damaged = len(services.collections.damaged)
                self._read_at = time.monotonic()
            stats, damaged = list(self._stats), self._damaged
        yield GaugeMetricFamily(
            "dinoscope_collections_damaged", "Collections that cannot be opened", value=damaged
        )
        yield from _of_collections(stats)


def _of_models(visions: Sequence[Vision]) -> Iterator[Metric]:
    info = InfoMetricFamily(
        "dinoscope_model",
        "What is served; vectors of different fingerprints cannot be compared",
        labels=["model"],
    )
    gauges = {
        name: GaugeMetricFamily(f"dinoscope_{name}", text, labels=["model"])
        for name, text in (
            ("queue_depth_pictures", "Pictures that wait for the model"),
            ("queue_limit_pictures", "The most that may; beyond it, 429"),
            ("queue_bytes", "Prepared pictures that wait for the model, in bytes"),
            ("queue_limit_bytes", "The most of them; beyond it, 429"),
            ("batch_limit_pictures", "The largest batch now; smaller after memory ran out"),
        )
    }
    for vision in visions:
        known, queue = vision.info, vision.batcher
        told = {"architecture": known.architecture, "fingerprint": known.fingerprint}
        info.add_metric([known.name], told)
        values = (
            queue.waiting,
            queue.max_waiting,
            queue.waiting_bytes,
            queue.max_waiting_bytes or 0,
            queue.batch_limit,
        )
        for gauge, value in zip(gauges.values(), values, strict=True):
            gauge.add_metric([known.name], value)
    yield info
    yield from gauges.values()


def _of_cache(visions: Sequence[Vision]) -> Iterator[Metric]:
    """Of the results that all models keep in one place."""
    lookups = CounterMetricFamily(
        "dinoscope_cache_requests",
        "Look-ups of results by a picture's content: hit, miss, or shared with one in flight",
        labels=["outcome"],
    )
    evictions = CounterMetricFamily(
        "dinoscope_cache_evictions", "Results that made room for others", value=None
    )
    held = GaugeMetricFamily("dinoscope_cache_bytes", "Results that are kept, in bytes")
    limit = GaugeMetricFamily("dinoscope_cache_limit_bytes", "The most of them")
    if visions:
        cache, joined = visions[0].cache, sum(vision.joined for vision in visions)
        # What joined another's computation was looked up before, and missed.
        outcomes = {"hit": cache.hits, "miss": cache.misses - joined, "shared": joined}
        for outcome, count in outcomes.items():
            lookups.add_metric([outcome], max(0, count))
        evictions.add_metric([], cache.evictions)
        held.add_metric([], cache.held_bytes)
        limit.add_metric([], cache.max_bytes)
    yield from (lookups, evictions, held, limit)


def _of_collections(stats: Sequence[Stats]) -> Iterator[Metric]:
    def gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(f"dinoscope_{name}", text, labels=["collection", *labels])

    records = gauge("collection_records", "Pictures in the collection")
    disk = gauge("collection_disk_bytes", "Records and saved indexes on disk, in bytes")
    memory = gauge("collection_memory_bytes", "Indexes, ids and metadata in memory, in bytes")
    rows = gauge("index_rows", "Vectors in memory, removed ones too until cleared out", "space")
    pending = gauge("index_pending_rows", "Those that the structure lacks yet", "space")
    generation = gauge("index_generation", "How many times the index was saved", "space")
    kinds = gauge("index_kind", "1 for the kind of index that answers now", "space", "kind")
    for one in stats[:MOST_COLLECTIONS]:
        records.add_metric([one.name], one.count)
        disk.add_metric([one.name], one.disk_bytes)
        memory.add_metric([one.name], one.memory_bytes)
        for space, each in one.spaces.items():
            rows.add_metric([one.name, space], each.rows)
            pending.add_metric([one.name, space], each.pending)
            generation.add_metric([one.name, space], each.generation)
            kinds.add_metric([one.name, space, each.kind], 1)
    rest = stats[MOST_COLLECTIONS:]
    if rest:
        records.add_metric([REST], sum(one.count for one in rest))
        disk.add_metric([REST], sum(one.disk_bytes for one in rest))
        memory.add_metric([REST], sum(one.memory_bytes for one in rest))
    yield GaugeMetricFamily("dinoscope_collections", "Collections that are open", value=len(stats))
    yield from (records, disk, memory, rows, pending, generation, kinds)


def _read(collections: CollectionSet) -> list[Stats]:
    found = []
    for name in collections.names():
        try:
            found.append(collections.get(name).stats())
        except (CollectionError, OSError):
            continue  # damaged, which has a gauge of its own, or deleted since
    return found
