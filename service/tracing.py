"""OpenTelemetry traces, an extra: a span for each request, and in it one for each phase.

Spans are made when a request is over, from what was measured; nothing else knows of them.
"""

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from service.measurements import Measurements

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

_NAMES = {
    "request_id": "dinoscope.request_id",
    "method": "http.request.method",
    "route": "http.route",
    "status": "http.response.status_code",
    "error_code": "error.type",
    "client": "client.address",
    "model": "dinoscope.model",
    "pictures": "dinoscope.pictures",
    "received_bytes": "http.request.body.size",
    "sent_bytes": "http.response.body.size",
}


class TracingUnavailable(ValueError):
    """Traces were asked for, and the packages that make them are not installed."""


class Tracing:
    """Sends spans to `exporter`, in batches from a thread of its own.

    Raises:
        TracingUnavailable: the extra `telemetry` is not installed.
    """

    def __init__(self, exporter: "SpanExporter") -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "dinoscope"}), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("dinoscope")
        self._propagator = TraceContextTextMapPropagator()

    def record(
        self,
        request: Measurements,
        fields: Mapping[str, Any],
        *,
        headers: Iterable[tuple[bytes, bytes]],
    ) -> str:
        """The spans of a request that is over, under its caller's where it names one.

        Args:
            fields: what the log says of it.

        Returns:
            The trace's id, in hex.
        """
        from opentelemetry.trace import SpanKind, StatusCode, format_trace_id, set_span_in_context

        def at(monotonic: float) -> int:
            return now_ns - round((now - monotonic) * 1e9)

        now, now_ns = time.monotonic(), time.time_ns()
        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
        span = self._tracer.start_span(
            f"{fields['method']} {fields['route']}",
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            attributes={
                name: fields[key] for key, name in _NAMES.items() if fields[key] is not None
            },
            start_time=at(request.started),
        )
        if fields["status"] >= 500:
            span.set_status(StatusCode.ERROR)
        inside = set_span_in_context(span)
        for phase in request.phases:
            part = self._tracer.start_span(phase.name, context=inside, start_time=at(phase.started))
            part.end(end_time=at(phase.ended))
        span.end(end_time=now_ns)
        return format_trace_id(span.get_span_context().trace_id)

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()


def open_tracing(endpoint: str) -> Tracing:
    """Traces to an OTLP endpoint over HTTP, e.g. http://127.0.0.1:4318/v1/traces.

    Raises:
        TracingUnavailable: the extra `telemetry` is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise TracingUnavailable(
            "DINOSCOPE_OTLP_ENDPOINT is set, but the packages that send traces are not installed: "
            "pip install 'dinoscope[telemetry]'"
        ) from error
    # What cannot be sent within seconds is dropped: a collector that is away holds nothing up.
    return Tracing(OTLPSpanExporter(endpoint=endpoint, timeout=5))
