"""One request and its answer over HTTP, under one deadline and one watch over the client's presence."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ernie_cluster.api.body import read_body
from ernie_cluster.api.deadline import TIMEOUT_HEADER, timeout_of
from ernie_cluster.api.generation import Work
from ernie_cluster.api.guest import guest_of
from ernie_cluster.api.service import Service
from ernie_cluster.api.status import INTERNAL, status_of
from ernie_cluster.api.wire import HttpWire, unless_disconnected
from ernie_cluster.errors import Aborted

_log = logging.getLogger(__name__)

LAST_WORD_TIMEOUT_S = 5.0
"""For the error event that ends a stream."""


class Exchange(Response):
    """One request with a body, from its first byte to the last of its answer; what lies between, the work knows."""

    def __init__(self, service: Service, work: Work) -> None:
        self._service = service
        self._work = work
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, work, wire = self._service, self._work, HttpWire(send, self._service.limits.client_idle_timeout_s)
        timeout_s = timeout_of(Headers(scope=scope).get(TIMEOUT_HEADER), service.limits.request_timeout_s)
        try:
            async with service.request(timeout_s) as meter:
                guest = guest_of(scope)
                # no variable holds the body: it is gone when the work has read it, not when the answer is over
                await unless_disconnected(
                    receive,
                    work.answer(
                        await read_body(scope, receive, service.limits, meter.took), wire, meter, guest, timeout_s
                    ),
                )
        except Exception as e:
            if wire.is_broken:
                log_error(e)
                return  # the server closes a connection whose response is not whole
            if not wire.is_stream_open:
                raise  # the handlers of the app make it a response
            assert work.look is not None
            log_error(e)
            with suppress(Aborted, TimeoutError):  # who has left, or reads no more, misses nothing
                async with asyncio.timeout(LAST_WORD_TIMEOUT_S):
                    await wire.write_events(work.look.failure(e), is_last=True)


def log_error(exc: Exception) -> None:
    """Faults of ours with their trace; all others in a line."""
    if status_of(exc) is INTERNAL:
        _log.error("request failed", exc_info=exc)
    else:
        _log.info("request failed: %s", exc)
