"""An answer on its way out over HTTP, and the client's presence while it is made. ASGI only."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from starlette.types import Receive, Send

from ernie_cluster.api.openai import encode
from ernie_cluster.errors import Aborted, SlowClient

T = TypeVar("T")

PIECE_BYTES = 1 << 16
"""A whole answer goes out in pieces of this size: a server takes one whatever its size, and then waits until it is read."""
KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, which readers of server-sent events skip."""


class HttpWire:
    """Sends one response, see `Wire`. Its status line goes out with the first bytes; an error before that can have its own.

    Args:
        send: of the ASGI server; waits while more is unread than the server buffers.
        idle_timeout_s: how long that may last.
    """

    def __init__(self, send: Send, idle_timeout_s: float) -> None:
        self._send = send
        self._idle_timeout_s = idle_timeout_s
        self.is_stream_open = False
        """Events have been sent, and more may follow."""
        self.is_broken = False
        """The client is gone, or reads no more; nothing can be told to it."""

    async def write_whole(self, answer: Any) -> None:
        """As JSON."""
        body = encode(answer)
        await self._start((b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)))
        for start in range(0, len(body), PIECE_BYTES):
            piece, is_last = body[start : start + PIECE_BYTES], start + PIECE_BYTES >= len(body)
            await self._put({"type": "http.response.body", "body": piece, "more_body": not is_last})

    async def write_events(self, events: Sequence[bytes], *, is_last: bool) -> None:
        """Server-sent events."""
        if not self.is_stream_open:
            self.is_stream_open = True
            await self._start(
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-store"),
                (b"x-accel-buffering", b"no"),  # nginx would gather the events otherwise
            )
        await self._put({"type": "http.response.body", "body": b"".join(events), "more_body": not is_last})
        self.is_stream_open = not is_last

    async def keep_alive(self) -> None:
        """A comment."""
        await self.write_events((KEEP_ALIVE,), is_last=False)

    async def _start(self, *headers: tuple[bytes, bytes]) -> None:
        await self._put({"type": "http.response.start", "status": 200, "headers": list(headers)})

    async def _put(self, message: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(self._idle_timeout_s) as idle:
                await self._send(message)
        except OSError:  # what ASGI servers raise when the connection is closed
            self.is_broken = True
            if idle.expired():
                raise SlowClient(f"the client has read nothing of its answer for {self._idle_timeout_s:g} s") from None
            raise Aborted("the client left") from None


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Result of `work`, which is cancelled when the client leaves first. The request's body must have been read.

    Raises:
        Aborted: the client left; `work` has come to its end.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Aborted("the client left")
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
