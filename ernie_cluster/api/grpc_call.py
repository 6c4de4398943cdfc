"""One gRPC call from its message to its status; what lies between, the face that it belongs to knows.

A handler reads the message itself, so that it is looked at who calls before a byte of it is taken, and the wait for it
has an end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

import grpc

from ernie_cluster.api.exchange import LAST_WORD_TIMEOUT_S, log_error
from ernie_cluster.api.grpc_door import Visit, visit_here
from ernie_cluster.api.limits import ApiLimits
from ernie_cluster.api.status import grpc_metadata, message_with_field, status_of
from ernie_cluster.errors import Aborted, DeadlineExceeded, InvalidRequest, SlowClient
from ernie_cluster.observe.log import bind_caller, bind_request_id
from ernie_cluster.observe.trace_context import bind_trace

MAX_DETAILS_BYTES = 2000
"""Of an error's words: they travel in a header, in which all headers together may have 8 KiB, and three bytes may stand
for one."""

Behaviour = Callable[["Call"], Awaitable[None]]
"""What is done for a call; raises our errors."""


class Call:
    """One call. It is its own `Wire`: each event is a message.

    Args:
        context: grpc's; its writes wait while the client's flow-control window is full.
        visit: whose call it is.
        idle_timeout_s: how long one write may wait.
    """

    def __init__(self, context: grpc.aio.ServicerContext, visit: Visit, idle_timeout_s: float) -> None:
        self._context = context
        self._idle_timeout_s = idle_timeout_s
        self.visit = visit

    @property
    def time_remaining_s(self) -> float | None:
        """Until the client's deadline; None when it has set none."""
        remaining: float | None = self._context.time_remaining()
        return remaining

    async def read(self, limits: ApiLimits) -> bytes:
        """The call's only message.

        Raises:
            InvalidRequest: there is none.
            DeadlineExceeded: it did not come in time.
        """
        try:
            async with asyncio.timeout(limits.body_timeout_s):
                message = await self._context.read()
        except TimeoutError:
            raise DeadlineExceeded(f"the message did not arrive within {limits.body_timeout_s:g} s") from None
        if message is grpc.aio.EOF:
            raise InvalidRequest("the call brought no message, or one that is larger than the server takes")
        raw: bytes = message
        return raw

    async def write_whole(self, answer: bytes) -> None:
        await self.write_events((answer,), is_last=True)

    async def write_events(self, events: Sequence[bytes], *, is_last: bool) -> None:
        try:
            for event in events:
                async with asyncio.timeout(self._idle_timeout_s):
                    await self._context.write(event)
        except TimeoutError:
            raise SlowClient(f"the client has read nothing of its answer for {self._idle_timeout_s:g} s") from None
        except grpc.aio.BaseError:
            raise Aborted("the client left") from None

    async def keep_alive(self) -> None:
        """HTTP/2 has pings for that, see `grpc_server`."""

    def succeed(self) -> None:
        """What is told at the end of an answer."""
        self._context.set_trailing_metadata(self.visit.metadata())

    async def fail(self, exc: Exception) -> None:
        """End the call with this error's status, unless nobody listens any more."""
        log_error(exc)
        with suppress(TimeoutError, grpc.aio.UsageError):  # who reads no more, or has left, misses nothing
            async with asyncio.timeout(LAST_WORD_TIMEOUT_S):
                await self._context.abort(
                    getattr(grpc.StatusCode, status_of(exc).grpc),
                    _details(exc),
                    (*self.visit.metadata(), *grpc_metadata(exc).items()),
                )


def handler(behaviour: Behaviour, limits: ApiLimits) -> grpc.RpcMethodHandler:
    """For a method of any kind: on the wire they differ only in how many messages there are."""

    async def serve(_: object, context: grpc.aio.ServicerContext) -> None:
        visit = visit_here()
        call = Call(context, visit, limits.client_idle_timeout_s)
        with bind_request_id(visit.request_id), bind_caller(visit.guest.name), bind_trace(visit.trace):
            try:
                await behaviour(call)
                call.succeed()
            except Exception as e:
                await call.fail(e)

    return grpc.stream_stream_rpc_method_handler(serve)


def _details(exc: Exception) -> str:
    return message_with_field(exc).encode("utf-8", "replace")[:MAX_DETAILS_BYTES].decode("utf-8", "ignore")
