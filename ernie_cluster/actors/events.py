"""Outcomes of one engine on their way to the API replicas that asked for them.

Each API replica keeps one poll open per engine. A poll is answered with all that has gathered, so the cost is per
round trip, not per token and not per request, and batches grow by themselves under load. A batch is kept until the
next poll acknowledges it. An API replica that stops polling, or takes less than comes for too long, is taken for dead: its
requests are given up.

Lives on the actor's event loop; `publish` may be called from any thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ernie_cluster.actors.messages import Batch, Outcome
from ernie_cluster.errors import Evicted
from ernie_cluster.request import RequestFailed

_log = logging.getLogger(__name__)

_FLUSH_PAUSE_S = 0.01
CLIENT_TIMEOUT_S = 10.0
"""A client that has not polled for this long is gone."""
BATCH_BYTES = 1 << 20
"""A batch takes no more outcomes once it weighs so much; the others come with the next poll."""
MAX_UNREAD_BYTES = 64 << 20
"""A client with more than this unread is gone: a million tokens, a minute's work of a large engine."""


def weight(outcome: Outcome) -> int:
    """About how many bytes an outcome holds, here and on the wire; an upper bound of its pickle."""
    if isinstance(outcome, RequestFailed):
        return 1024 + 4 * len(str(outcome.error))
    num_ranked = sum(1 + len(logprobs.top) for logprobs in outcome.logprobs)
    num_details = sum(1 + len(span.detail) for span in outcome.spans)
    return 256 + 16 * len(outcome.token_ids) + 32 * num_ranked + 256 * num_details + 4 * len(outcome.request_id)


@dataclass(slots=True)
class _Client:
    waiting: deque[Outcome] = field(default_factory=deque)
    num_unread_bytes: int = 0
    """Of those that wait and those that are not acknowledged."""
    unacknowledged: tuple[Outcome, ...] = ()
    number: int = 0
    requests: set[str] = field(default_factory=set)
    has_news: asyncio.Event = field(default_factory=asyncio.Event)
    last_seen_s: float = 0.0


class EventHub:
    """Owns the outboxes of all clients of one engine.

    Args:
        clock: monotonic seconds.
        idle_s: an empty answer after this long shows both sides that the other lives.
    """

    def __init__(self, clock: Callable[[], float], idle_s: float) -> None:
        self._clock, self._idle_s = clock, idle_s
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
        """What has come since the acknowledged batch, `BATCH_BYTES` of it; waits up to `idle_s` for something to come.

        Asking again with the same number gives the same outcomes again, and what has come since.

        Raises:
            Evicted: the client was given up meanwhile, and its requests with it.
        """
        client = self._client(client_id)
        if acknowledged > client.number:
            raise Evicted(
                f"the requests of client {client_id} were given up, for it did not read their outcomes in time"
            )
        client.last_seen_s = self._clock()
        if acknowledged == client.number:
            client.num_unread_bytes -= sum(map(weight, client.unacknowledged))
            client.unacknowledged = ()
        if not client.unacknowledged and not client.waiting:
            client.has_news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._idle_s):
                    await client.has_news.wait()
        batch, room = list(client.unacknowledged), BATCH_BYTES - sum(map(weight, client.unacknowledged))
        while client.waiting and room > 0:
            room -= weight(client.waiting[0])
            batch.append(client.waiting.popleft())
        client.unacknowledged = tuple(batch)
        client.number += 1
        return Batch(client.number, client.unacknowledged)

    async def flushed(self, timeout_s: float) -> None:
        """Until every client has taken all that was told it, so long at most."""
        deadline = self._clock() + timeout_s
        while self._is_owing() and self._clock() < deadline:  # noqa: ASYNC110  polls say so
            await asyncio.sleep(_FLUSH_PAUSE_S)

    def live_requests(self) -> list[str]:
        """Requests of clients that still poll."""
        return [r for c in self._clients.values() for r in c.requests]

    @property
    def num_unread_bytes(self) -> int:
        """Of all clients."""
        return sum(client.num_unread_bytes for client in self._clients.values())

    def left(self, client_id: str) -> None:
        """The connection over which a client polled has ended: it is gone, unless it polls over another one soon."""
        if client_id in self._clients:
            self._clients[client_id].last_seen_s = -math.inf

    def drop_silent(self) -> list[str]:
        """Forget clients that stopped polling, or fell too far behind; their requests."""
        now = self._clock()
        gone = [
            k
            for k, c in self._clients.items()
            if now - c.last_seen_s > CLIENT_TIMEOUT_S or c.num_unread_bytes > MAX_UNREAD_BYTES
        ]
        for name in gone:
            _log.warning("client %s reads no more; %d bytes are given up", name, self._clients[name].num_unread_bytes)
        orphans = [r for k in gone for r in self._clients.pop(k).requests]
        for request_id in orphans:
            self._client_of.pop(request_id, None)
        return orphans

    def _is_owing(self) -> bool:
        return any(c.waiting or c.unacknowledged for c in self._clients.values())

    def _client(self, client_id: str) -> _Client:
        if client_id not in self._clients:
            self._clients[client_id] = _Client(last_seen_s=self._clock())
        return self._clients[client_id]

    def _publish(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            client = self._clients.get(self._client_of.get(outcome.request_id, ""))
            if client is not None:
                client.waiting.append(outcome)
                client.num_unread_bytes += weight(outcome)
                client.has_news.set()
                if isinstance(outcome, RequestFailed) or outcome.finish_reason is not None:
                    self.close(outcome.request_id)
