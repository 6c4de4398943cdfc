"""What becomes of a request's times: spans, in the trace of whoever asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from ernie_cluster.api.tracing import Journey, SpanTracer
from ernie_cluster.observe.trace_context import TraceContext
from ernie_cluster.request import Span

TRACE = TraceContext("ab" * 16, "cd" * 8, True, "ef" * 8)
STAGES = (
    Span("preprocess", 10.0, 0.5),
    Span("route", 10.5, 0.25),
    Span("prefill", 10.75, 1.0, (("tokens", 7),)),
    Span("route", 12.0, 0.25, (("why", "shortest"),)),
    Span("transfer", 12.5, -1.0, (("failed", "late"),)),
)
JOURNEY = Journey("chat m", 10.0, 14.0, {"gen_ai.request.model": "m"}, STAGES)


def spans_of(trace: TraceContext, journey: Journey) -> Sequence[Any]:
    exporter = InMemorySpanExporter()
    tracer = SpanTracer(exporter, 1.0, {"service.name": "here"})
    tracer.record(trace, journey)
    tracer.close()
    return exporter.get_finished_spans()


def test_a_request_is_a_span_of_its_callers_trace_and_its_stages_are_below() -> None:
    root, *stages = spans_of(TRACE, JOURNEY)
    assert (f"{root.context.trace_id:032x}", f"{root.context.span_id:016x}") == (TRACE.trace_id, TRACE.span_id)
    assert (f"{root.parent.span_id:016x}", root.parent.is_remote) == (TRACE.parent_id, True)
    assert (root.name, root.start_time, root.end_time) == ("chat m", 10 * 10**9, 14 * 10**9)
    assert root.attributes["gen_ai.request.model"] == "m"
    assert root.resource.attributes["service.name"] == "here"
    assert [span.name for span in stages] == [stage.name for stage in STAGES]
    assert {span.parent.span_id for span in stages} == {root.context.span_id}
    assert len({span.context.span_id for span in (root, *stages)}) == len(stages) + 1
    assert [span.attributes["ernie.attempt"] for span in stages] == [0, 1, 1, 2, 2]
    assert stages[2].attributes["ernie.tokens"] == 7
    assert stages[3].attributes["ernie.why"] == "shortest"
    assert stages[4].end_time == stages[4].start_time, "a clock that was set back makes no negative span"
    assert (stages[4].status.is_ok, stages[4].status.description) == (False, "late")


def test_who_has_no_caller_has_no_parent() -> None:
    assert spans_of(TraceContext.under("", 1.0), JOURNEY)[0].parent is None


def test_a_failure_is_said() -> None:
    (root,) = spans_of(TRACE, Journey("chat m", 1.0, 2.0, error="overloaded"))
    assert (root.status.is_ok, root.status.description) == (False, "overloaded")


def test_what_is_not_sampled_is_not_sent() -> None:
    assert not spans_of(TraceContext(TRACE.trace_id, TRACE.span_id, False), JOURNEY)


@pytest.mark.parametrize(("ratio", "least", "most"), [(0.0, 0, 0), (0.5, 350, 650), (1.0, 1000, 1000)])
def test_a_share_of_new_traces_is_sampled(ratio: float, least: int, most: int) -> None:
    assert least <= sum(TraceContext.under("", ratio).is_sampled for _ in range(1000)) <= most


def test_callers_decide_for_themselves() -> None:
    assert not TraceContext.under(f"00-{'ab' * 16}-{'cd' * 8}-00", 1.0).is_sampled
    assert TraceContext.under(f"00-{'ab' * 16}-{'cd' * 8}-01", 0.0).is_sampled


class Broken(SpanExporter):
    def export(self, spans: Sequence[Any]) -> SpanExportResult:
        raise OSError("no collector")


def test_a_collector_that_is_away_harms_nobody() -> None:
    tracer = SpanTracer(Broken(), 1.0, {})
    for _ in range(5000):  # more than the queue holds
        tracer.record(TRACE, JOURNEY)
    tracer.close()
