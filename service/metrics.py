"""The service's Prometheus metrics; docs/metrics.md lists them all.

One registry an application, nothing global. Names carry their units; counters get `_total` from the
library. Labels take few values: route templates, models, and the first collections by name.
"""

from collections.abc import Hashable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
UNKNOWN_ROUTE = "(unknown)"  # a path that no route has
OTHER_METHOD = "(other)"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """What is counted while requests are served; `service.collectors` adds what is looked up."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        self._answers: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        self._requests = Counter(
            "dinoscope_http_requests",
            "Answers by route template, method and status; 499: the client left before",
            ["route", "method", "status"],
            registry=registry,
        )
        self._duration = Histogram(
            "dinoscope_http_request_duration_seconds",
            "From a request's first byte to its answer's last",
            ["route", "method"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.in_progress = Gauge(
            "dinoscope_http_requests_in_progress",
            "Requests that are being served",
            registry=registry,
        )
        self._received = Counter(
            "dinoscope_http_received_bytes", "Bodies of requests, in bytes", registry=registry
        )
        self._sent = Counter(
            "dinoscope_http_sent_bytes", "Bodies of answers, in bytes", registry=registry
        )
        self._rejections = Counter(
            "dinoscope_rejections",
            "Requests that were refused for want of room or time, by the error's code",
            ["reason"],
            registry=registry,
        )
        self._pictures = Counter("dinoscope_pictures", "Pictures decoded", registry=registry)
        self._picture_bytes = Counter(
            "dinoscope_picture_bytes", "Pictures decoded, in bytes as they came", registry=registry
        )
        self.decode = Histogram(
            "dinoscope_decode_seconds",
            "A picture's decoding and preprocessing, or the drawing of its maps, in a thread",
            buckets=_SECONDS,
            registry=registry,
        )
        self._queue_wait = Histogram(
            "dinoscope_queue_wait_seconds",
            "From a picture's place in the model's queue to its batch",
            ["model"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._inference = Histogram(
            "dinoscope_inference_seconds",
            "One forward pass of a batch",
            ["model", "task"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._batch_size = Histogram(
            "dinoscope_batch_size_pictures",
            "Pictures in one forward pass",
            ["model", "task"],
            buckets=_SIZES,
            registry=registry,
        )
        self._batch_failures = Counter(
            "dinoscope_batch_failures",
            "Forward passes that failed; a batch's halves are tried again",
            ["model", "reason"],
            registry=registry,
        )

    def request_done(
        self, *, route: str | None, method: str, status: int, seconds: float, code: str | None
    ) -> None:
        """An answer was sent, or its client left; `route` None: no route has the path."""
        answers, duration = self._of_answers(
            route or UNKNOWN_ROUTE, method if method in METHODS else OTHER_METHOD, status
        )
        answers.inc()
        duration.observe(seconds)
        if status in (429, 503) and code is not None:
            self._rejections.labels(code).inc()

    def _of_answers(self, route: str, method: str, status: int) -> tuple[Counter, Histogram]:
        key = route, method, status
        if key not in self._answers:  # as few as the labels' values; to find them again takes time
            answers = self._requests.labels(route, method, str(status))
            self._answers[key] = answers, self._duration.labels(route, method)
        return self._answers[key]

    def bodies(self, *, received_bytes: int, sent_bytes: int) -> None:
        """The bodies of a request and of its answer."""
        self._received.inc(received_bytes)
        self._sent.inc(sent_bytes)

    def pictures_done(self, count: int, encoded_bytes: int) -> None:
        """Pictures that a request brought."""
        self._pictures.inc(count)
        self._picture_bytes.inc(encoded_bytes)

    def of_model(self, name: str) -> "ModelMetrics":
        """Those of one model; names are the operator's, so they are few."""
        return ModelMetrics(self, name)


class ModelMetrics:
    """One model's: the batcher's observer."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics = metrics
        self._model = model
        self._wait = metrics._queue_wait.labels(model)

    def batch_done(self, kind: Hashable, size: int, seconds: float) -> None:
        """See `BatchObserver`; the first part of a kind is its task."""
        task = str(kind[0] if isinstance(kind, tuple) else kind)
        self._metrics._inference.labels(self._model, task).observe(seconds)
        self._metrics._batch_size.labels(self._model, task).observe(size)

    def batch_failed(self, *, out_of_memory: bool) -> None:
        """See `BatchObserver`."""
        reason = "out_of_memory" if out_of_memory else "error"
        self._metrics._batch_failures.labels(self._model, reason).inc()

    def waited(self, seconds: float) -> None:
        """See `BatchObserver`."""
        self._wait.observe(seconds)
