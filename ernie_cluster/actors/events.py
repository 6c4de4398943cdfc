"""Outcomes of one engine on their way to the API replicas that asked for them.

Each API replica keeps one poll open per engine. A poll is answered with all that has gathered, so the cost is per
round trip, not per token and not per request, and batches grow by themselves under load. A batch is kept until the
next poll acknowledges it. An API replica that stops polling is taken for dead: its requests are given up.

Lives on the actor's event loop; `publish` may be called from any thread.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

from ernie_cluster.actors.messages import Batch, Outcome
from ernie_cluster.request import RequestFailed

POLL_S = 2.0
"""An empty answer after this long shows both sides that the other lives."""
CLIENT_TIMEOUT_S = 10.0
"""A client that has not polled for this long is gone."""


@dataclass(slots=True)
class _Client:
    waiting: list[Outcome] = field(default_factory=list)
    unacknowledged: tuple[Outcome, ...] = ()
    number: int = 0
    requests: set[str] = field(default_factory=set)
    has_news: asyncio.Event = field(default_factory=asyncio.Event)
    last_seen_s: float = 0.0


class EventHub:
    """Owns the outboxes of all clients of one engine.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._clients: dict[str, _Client] = {}
        self._client_of: dict[str, str] = {}

    def open(self, client_id: str, request_id: str) -> None:
        """Outcomes of this request go to this client from now on."""
        client = self._client(client_id)
        client.requests.add(request_id)
        self._client_of[request_id] = client_id

    def is_open(self, request_id: str) -> bool:
        """Whether somebody still wants this request's outcomes."""
        return request_id in self._client_of

    def close(self, request_id: str) -> None:
        """Nobody wants this request's outcomes any more."""
        client = self._clients.get(self._client_of.pop(request_id, ""))
        if client is not None:
            client.requests.discard(request_id)

    def publish(self, outcomes: list[Outcome]) -> None:
        """Hand outcomes over; from any thread."""
        self._loop.call_soon_threadsafe(self._publish, outcomes)

    async def poll(self, client_id: str, acknowledged: int) -> Batch:
        """Everything since the acknowledged batch; waits up to `POLL_S` for something to come.

        Asking again with the same number gives the same outcomes again, and what has come since.
        """
        client = self._client(client_id)
        client.last_seen_s = self._clock()
        if acknowledged == client.number:
            client.unacknowledged = ()
        if not client.unacknowledged and not client.waiting:
            client.has_news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await client.has_news.wait()
        client.unacknowledged += tuple(client.waiting)
        client.waiting.clear()
        client.number += 1
        return Batch(client.number, client.unacknowledged)

    def live_requests(self) -> list[str]:
        """Requests of clients that still poll."""
        return [r for c in self._clients.values() for r in c.requests]

    def drop_silent(self) -> list[str]:
        """Forget clients that stopped polling; their requests."""
        now = self._clock()
        gone = [k for k, c in self._clients.items() if now - c.last_seen_s > CLIENT_TIMEOUT_S]
        orphans = [r for k in gone for r in self._clients.pop(k).requests]
        for request_id in orphans:
            self._client_of.pop(request_id, None)
        return orphans

    def _client(self, client_id: str) -> _Client:
        if client_id not in self._clients:
            self._clients[client_id] = _Client(last_seen_s=self._clock())
        return self._clients[client_id]

    def _publish(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            client = self._clients.get(self._client_of.get(outcome.request_id, ""))
            if client is not None:
                client.waiting.append(outcome)
                client.has_news.set()
                if isinstance(outcome, RequestFailed) or outcome.finish_reason is not None:
                    self.close(outcome.request_id)
