"""The door of the gRPC face: who calls, before a byte of his message is taken. The same guard as HTTP's decides.

A method is closed unless it is named here, whichever service it belongs to.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

import grpc

from ernie_cluster.api.guard import Guard
from ernie_cluster.api.guest import ANYBODY, Guest
from ernie_cluster.api.middleware import usable_request_id
from ernie_cluster.errors import RequestError
from ernie_cluster.observe.trace_context import TRACEPARENT, TraceContext

OPEN = frozenset({"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"})
"""Methods that never need a key."""
COUNTED = frozenset(
    f"/ernie_cluster.v1.Inference/{name}" for name in ("Chat", "StreamChat", "Generate", "StreamGenerate", "Tokenize")
)
"""Methods whose calls count as requests of a key; all else is looking around, and free."""


@dataclass(frozen=True, slots=True)
class Visit:
    """One call, and who makes it."""

    guest: Guest
    request_id: str
    error: RequestError | None = None
    """Why he may not come in."""
    trace: TraceContext = field(default_factory=lambda: TraceContext.under(""))

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Trailing metadata of the call: its ids, and what is left to the guest."""
        rest = [(name.decode(), value.decode()) for name, value in self.guest.headers()]
        return (("x-request-id", self.request_id), (TRACEPARENT, self.trace.header()), *rest)


_visit: ContextVar[Visit] = ContextVar("visit")


def visit_here() -> Visit:
    """Of the call that is being handled here."""
    return _visit.get()


class Door(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    """Notes each call's visit, and turns away who may not come in.

    Args:
        guard: None lets everybody in.
        refuse: handles the calls of those who may not.
        sample_ratio: see `Boundary`.
    """

    def __init__(self, guard: Guard | None, refuse: grpc.RpcMethodHandler, sample_ratio: float = 0.0) -> None:
        self._guard = guard
        self._refuse = refuse
        self._sample_ratio = sample_ratio

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        given = dict(handler_call_details.invocation_metadata).get(TRACEPARENT, "")
        visit = replace(
            await self._visit_of(handler_call_details), trace=TraceContext.under(str(given), self._sample_ratio)
        )
        _visit.set(visit)  # each call is a task of its own
        return self._refuse if visit.error else await continuation(handler_call_details)

    async def _visit_of(self, details: grpc.HandlerCallDetails) -> Visit:
        headers = [(name.encode(), _bytes(value)) for name, value in details.invocation_metadata]
        request_id = usable_request_id(dict(headers).get(b"x-request-id", b"").decode(errors="replace"))
        guest = ANYBODY
        if self._guard is None or details.method in OPEN:
            return Visit(guest, request_id)
        try:
            guest = await self._guard.identify({"path": details.method, "headers": headers})
            if details.method in COUNTED:
                guest.knock()
        except RequestError as e:
            self._guard.refused(e)
            return Visit(guest, request_id, e)
        return Visit(guest, request_id)


def _bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()
