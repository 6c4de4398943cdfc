"""Spans of requests, for a collector. Who serves a request keeps its times anyway: they become spans when it is over."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ernie_cluster.errors import ConfigError
from ernie_cluster.observe.trace_context import TraceContext
from ernie_cluster.request import Span

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

_NS = 1_000_000_000

Value = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Journey:
    """One request that is over. Holds nothing that a client has written but the name of a model."""

    name: str
    start_s: float
    """Wall clock, seconds since the epoch."""
    end_s: float
    attributes: Mapping[str, Value] = field(default_factory=dict)
    stages: Sequence[Span] = ()
    error: str = ""
    """How it failed, "" where it did not."""


class Tracer(Protocol):
    """Takes what is over; never waits, never raises."""

    sample_ratio: float
    """Of the requests whose callers do not say."""

    def record(self, trace: TraceContext, journey: Journey) -> None: ...

    def close(self) -> None:
        """Send what is left, within some seconds. Called on a thread."""
        ...


class NoTracer:
    """Records nothing."""

    sample_ratio = 0.0

    def record(self, trace: TraceContext, journey: Journey) -> None: ...

    def close(self) -> None: ...


class SpanTracer:
    """Owns a bounded queue of spans and the thread that sends them; a collector that is away costs spans, and nothing else.

    Args:
        exporter: sends spans.
        sample_ratio: see `Tracer`.
        resource: what all spans are of, for example {"service.name": "ernie_cluster"}.
    """

    def __init__(self, exporter: SpanExporter, sample_ratio: float, resource: Mapping[str, str]) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self.sample_ratio = sample_ratio
        self._queue = BatchSpanProcessor(exporter)
        self._resource = Resource.create(dict(resource))

    def record(self, trace: TraceContext, journey: Journey) -> None:
        """See `Tracer`; what is not sampled is passed over."""
        if not trace.is_sampled:
            return
        with suppress(Exception):  # a trace is worth no request
            for span in self._spans(trace, journey):
                self._queue.on_end(span)

    def close(self) -> None:
        """See `Tracer`."""
        self._queue.shutdown()  # type: ignore[no-untyped-call]

    def _spans(self, trace: TraceContext, journey: Journey) -> Iterable[Any]:
        """The request, and a child for each stage. An attempt that was made after another failed begins with a route of its own."""
        from opentelemetry.trace import SpanKind

        yield self._span(
            trace, trace.span_id, trace.parent_id, journey.name, journey.start_s, journey.end_s, SpanKind.SERVER,
            journey.attributes, journey.error,
        )  # fmt: skip
        attempts = itertools.accumulate(stage.name == "route" for stage in journey.stages)
        for stage, attempt in zip(journey.stages, attempts, strict=True):
            attributes = {f"ernie.{name}": value for name, value in stage.detail} | {"ernie.attempt": attempt}
            yield self._span(
                trace, secrets.token_hex(8), trace.span_id, stage.name, stage.start_s, stage.start_s + stage.duration_s,
                SpanKind.INTERNAL, attributes, str(dict(stage.detail).get("failed", "")),
            )  # fmt: skip

    def _span(
        self, trace: TraceContext, span_id: str, parent_id: str, name: str, start_s: float, end_s: float, kind: Any,
        attributes: Mapping[str, Value], error: str,
    ) -> Any:  # fmt: skip
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace import Status, StatusCode

        return ReadableSpan(
            name,
            _context(trace.trace_id, span_id, is_remote=False),
            _context(trace.trace_id, parent_id, is_remote=parent_id == trace.parent_id) if parent_id else None,
            self._resource,
            dict(attributes),
            kind=kind,
            status=Status(StatusCode.ERROR, error) if error else Status(StatusCode.UNSET),
            start_time=int(start_s * _NS),
            end_time=int(max(start_s, end_s) * _NS),
        )


def otlp_tracer(endpoint: str, sample_ratio: float) -> SpanTracer:
    """Sends to a collector; raises ConfigError when what that needs is not installed."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise ConfigError(
            "api.tracing needs the OTLP exporter, which is not installed on this node: pip install 'ernie-cluster[tracing]'"
        ) from None
    return SpanTracer(OTLPSpanExporter(endpoint=endpoint), sample_ratio, {"service.name": "ernie_cluster"})


def _context(trace_id: str, span_id: str, *, is_remote: bool) -> Any:
    from opentelemetry.trace import SpanContext, TraceFlags

    return SpanContext(int(trace_id, 16), int(span_id, 16), is_remote, TraceFlags(TraceFlags.SAMPLED))
