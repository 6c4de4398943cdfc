"""The header `traceparent`, by W3C's rules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_cluster.observe.trace_context import TraceContext

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.mark.parametrize(("flags", "is_sampled"), [("00", False), ("01", True), ("03", True), ("02", False)])
def test_a_trace_goes_on_with_a_span_of_ours(flags: str, is_sampled: bool) -> None:
    trace = TraceContext.under(f"00-{TRACE}-{SPAN}-{flags}")
    assert (trace.trace_id, trace.is_sampled) == (TRACE, is_sampled)
    assert trace.span_id != SPAN


def test_a_later_version_may_say_more() -> None:
    assert TraceContext.under(f"01-{TRACE}-{SPAN}-01-more").trace_id == TRACE


@pytest.mark.parametrize(
    "value",
    [
        "",
        "nonsense",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{SPAN}-01\n",
    ],
)
def test_what_cannot_be_used_begins_a_new_trace(value: str) -> None:
    trace = TraceContext.under(value)
    assert trace.trace_id != TRACE
    assert not trace.is_sampled


@given(st.text())
def test_what_we_say_can_be_read_again(value: str) -> None:
    trace = TraceContext.under(value)
    assert TraceContext.under(trace.header()).trace_id == trace.trace_id
