"""Requests of one router on their way to a place: decided at once, or as soon as the books have room for them.

It decides nothing: `policy.routing` says whether there is a path, `policy.waiting` whose turn it is.
"""

from __future__ import annotations

import asyncio
import time

from ernie_cluster.actors import background
from ernie_cluster.config.cluster import RouterConfig
from ernie_cluster.errors import Aborted
from ernie_cluster.policy.admission import Refusal
from ernie_cluster.policy.books import Books
from ernie_cluster.policy.routing import Path, choose_path
from ernie_cluster.policy.waiting import Ticket, WaitingRoom, drain_s

_PAUSE_S = 0.02
"""Between two looks at the books while somebody waits."""


class Queue:
    """Gives places out.

    Args:
        books: what there is; what is given out is booked.
        limits: how many may wait, and how long.
        settled_s: a router does not know all replicas before this, so until then even those wait who may not.
    """

    def __init__(self, books: Books, limits: RouterConfig, settled_s: float) -> None:
        self._books, self._limits, self._settled_s = books, limits, settled_s
        self._room = WaitingRoom(limits)
        self._waiters: dict[str, asyncio.Future[Path]] = {}
        self._lease_s: dict[str, float] = {}
        self._pump: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """How many wait."""
        return len(self._room)

    async def place(self, ticket: Ticket, lease_s: float) -> Path:
        """Decide the path of a request and book it.

        Args:
            lease_s: the booking lapses after this.

        Raises:
            ContextTooLong: it fits nowhere, ever.
            Overloaded: nowhere now, and it may not wait, or has waited for as long as it may.
            Aborted: it was given up.
        """
        now_s = time.monotonic()
        is_behind = self._room.is_behind(ticket)
        found = self._refused(ticket) if is_behind else self._decide(ticket, lease_s)
        if isinstance(found, Path):
            return found
        may_wait = now_s < max(ticket.give_up_s, self._settled_s) and found.retry_after_s is not None
        if not (may_wait and self._room.enter(ticket)):
            raise found.to_error()
        waiter: asyncio.Future[Path] = asyncio.get_running_loop().create_future()
        self._waiters[ticket.key] = waiter
        self._lease_s[ticket.key] = lease_s
        if self._pump is None or self._pump.done():
            self._pump = background.start(self._serve())
        try:
            return await waiter
        finally:
            self._room.leave(ticket.key)
            self._waiters.pop(ticket.key, None)
            self._lease_s.pop(ticket.key, None)

    def give_up(self, key: str) -> None:
        """Nobody wants this place any more; harmless when nobody waits for it."""
        waiter = self._waiters.get(key)
        if waiter is not None and not waiter.done():
            waiter.set_exception(Aborted("nobody waits for it any more"))

    async def _serve(self) -> None:
        """While somebody waits."""
        while len(self._room):
            for model in self._room.models:
                self._serve_model(model)
            now_s = time.monotonic()
            for ticket in self._room.expired(now_s):
                if now_s >= self._settled_s:
                    self._end(ticket, self._refused(ticket))
            await asyncio.sleep(_PAUSE_S)

    def _serve_model(self, model: str) -> None:
        while (ticket := self._room.first(model)) is not None:
            waiter = self._waiters[ticket.key]
            if waiter.done():
                self._room.leave(ticket.key)
                continue
            found = self._decide(ticket, self._lease_s[ticket.key])
            if isinstance(found, Refusal) and found.retry_after_s is not None:
                return
            self._end(ticket, found)

    def _end(self, ticket: Ticket, found: Path | Refusal) -> None:
        self._room.leave(ticket.key)
        waiter = self._waiters[ticket.key]
        if isinstance(found, Path):
            waiter.set_result(found)
        elif not waiter.done():
            waiter.set_exception(found.to_error())

    def _decide(self, ticket: Ticket, lease_s: float) -> Path | Refusal:
        now_s = time.monotonic()
        fleet = self._books.fleet(now_s)
        found = choose_path(ticket.demand, fleet, self._limits, exclude=ticket.exclude)
        if isinstance(found, Path):
            self._books.promise(ticket.key, found.promises, now_s + lease_s)
            self._room.charge(ticket.demand)
        return found

    def _refused(self, ticket: Ticket) -> Refusal:
        """What it is told that has to go: when its turn would come."""
        fleet = self._books.fleet(time.monotonic())
        found = choose_path(ticket.demand, fleet, self._limits, exclude=ticket.exclude)
        before_s = drain_s(fleet, ticket.demand.model, self._room.work_before(ticket))
        if isinstance(found, Path):
            return Refusal(f"{ticket.demand.model!r}: others wait before it", max(self._limits.retry_after_s, before_s))
        if found.retry_after_s is None:
            return found
        return Refusal(found.reason, found.retry_after_s + before_s)
