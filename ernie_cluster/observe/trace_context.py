"""W3C's trace context: which trace a request belongs to, as the header `traceparent` says it.

That of the request at hand travels in a context variable, which follows `await` and new tasks by itself.
"""

from __future__ import annotations

import contextlib
import contextvars
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass

TRACEPARENT = "traceparent"

_FORM = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII)
_INVALID_VERSION = "ff"
_SAMPLED = 1


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A request's place in a trace."""

    trace_id: str
    """32 hexadecimal digits, not all 0."""
    span_id: str
    """16 hexadecimal digits, not all 0; of the request here."""
    is_sampled: bool = False
    """Whether the trace is recorded: by the caller, or, where there is none, by us."""
    parent_id: str = ""
    """16 hexadecimal digits, of the caller's span; "" = there is none."""

    @staticmethod
    def under(given: str, sample_ratio: float = 0.0) -> TraceContext:
        """A new span of the trace that a client names, or of a new trace where it names none that can be used.

        Args:
            given: the header's value, or "". Of a later version than ours, what follows our fields is passed over.
            sample_ratio: share of new traces that is recorded, 0 to 1.
        """
        span_id, form = secrets.token_hex(8), _FORM.fullmatch(given)
        if form is None or not _is_usable(*form.groups()):
            trace_id = secrets.token_hex(16)
            return TraceContext(trace_id, span_id, int(trace_id[16:], 16) < sample_ratio * 2**64)
        return TraceContext(form[2], span_id, bool(int(form[4], 16) & _SAMPLED), form[3])

    def header(self) -> str:
        """What those who come after it are told."""
        return f"00-{self.trace_id}-{self.span_id}-{int(self.is_sampled):02x}"


def _is_usable(version: str, trace_id: str, span_id: str, flags: str, rest: str | None) -> bool:
    if version == _INVALID_VERSION or (version == "00" and rest is not None):
        return False
    return bool(int(trace_id, 16) and int(span_id, 16))


_current: contextvars.ContextVar[TraceContext | None] = contextvars.ContextVar("trace", default=None)


@contextlib.contextmanager
def bind_trace(trace: TraceContext) -> Iterator[None]:
    """What happens inside belongs to this trace, log lines as JSON among it."""
    token = _current.set(trace)
    try:
        yield
    finally:
        _current.reset(token)


def bound_trace() -> TraceContext | None:
    """The trace that `bind_trace` has bound here."""
    return _current.get()
