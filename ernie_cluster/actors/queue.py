"""Requests of one router on their way to a place: decided at once, or as soon as the books have room for them.

It decides nothing: `policy.routing` says whether there is a path, `policy.waiting` whose turn it is.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from collections.abc import Mapping

from ernie_cluster.actors import background
from ernie_cluster.config.router import RouterConfig
from ernie_cluster.errors import Aborted
from ernie_cluster.policy.admission import Refusal
from ernie_cluster.policy.baselines import baseline_of, narrowed
from ernie_cluster.policy.books import Books
from ernie_cluster.policy.breakers import Breakers
from ernie_cluster.policy.forecast import Forecasts, Outlook, too_late
from ernie_cluster.policy.routing import Path, choose_path
from ernie_cluster.policy.trust import to_avoid
from ernie_cluster.policy.waiting import Held, Ticket, WaitingRoom, drain_s

_PAUSE_S = 0.02
"""Between two looks at the books while somebody waits."""


class Queue:
    """Gives places out.

    Args:
        books: what there is; what is given out is booked.
        limits: how many may wait, and how long.
        forecasts: of when answers begin and end; who cannot be served in time is told so at once.
        breakers: who has failed too often.
        settled_s: a router does not know all replicas before this, so until then even those wait who may not.
    """

    def __init__(
        self, books: Books, limits: RouterConfig, forecasts: Forecasts, breakers: Breakers, settled_s: float
    ) -> None:
        self._books, self._limits, self._forecasts, self._settled_s = books, limits, forecasts, settled_s
        self._breakers = breakers
        self._baseline = baseline_of(limits, random.Random())
        self._room = WaitingRoom(limits)
        self._waiters: dict[str, asyncio.Future[Path]] = {}
        self._lease_s: dict[str, float] = {}
        self._pump: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """How many wait."""
        return len(self._room)

    def held(self) -> Mapping[str, Held]:
        """Those who wait, by model."""
        return self._room.held()

    async def place(self, ticket: Ticket, lease_s: float) -> Path:
        """Decide the path of a request and book it.

        Args:
            lease_s: the booking lapses after this.

        Raises:
            ContextTooLong: it fits nowhere, ever.
            Overloaded: nowhere now, and it may not wait, or has waited for as long as it may; or not in time.
            Aborted: it was given up.
        """
        now_s = time.monotonic()
        is_behind = self._room.is_behind(ticket)
        found = self._refused(ticket) if is_behind else self._decide(ticket, lease_s)
        if isinstance(found, Path):
            return found
        may_wait = now_s < max(ticket.give_up_s, self._settled_s) and found.retry_after_s is not None
        if found.is_late or not (may_wait and self._room.enter(ticket)):
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

    def knock(self, ticket: Ticket) -> Refusal | None:
        """Why such a request would be refused now, None where it would not be, or may wait; books nothing."""
        now_s = time.monotonic()
        if now_s < max(ticket.give_up_s, self._settled_s):
            return None
        found = self._look(ticket, now_s)
        return found if isinstance(found, Refusal) and found.retry_after_s is not None else None

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
            if now_s >= self._settled_s:
                for ticket in self._room.expired(now_s) + self._room.hopeless(self._books.fleet(now_s), now_s):
                    if ticket.key in self._room:
                        self._end(ticket, self._refused(ticket))
            await asyncio.sleep(_PAUSE_S)

    def _serve_model(self, model: str) -> None:
        while (ticket := self._room.first(model)) is not None:
            waiter = self._waiters[ticket.key]
            if waiter.done():
                self._room.leave(ticket.key)
                continue
            found = self._decide(ticket, self._lease_s[ticket.key])
            if isinstance(found, Refusal) and found.retry_after_s is not None and not found.is_late:
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
        found = self._look(ticket, now_s)
        if isinstance(found, Refusal):
            return found
        path, outlook = found
        self._books.promise(ticket.key, path.promises, now_s + lease_s)
        self._forecasts.keep(ticket.key, outlook, now_s, ticket.deadline_s)
        self._breakers.chosen([promise.replica_id for promise in path.promises], now_s)
        self._room.charge(ticket.demand)
        return dataclasses.replace(path, ttft_s=outlook.ttft_s)

    def _look(self, ticket: Ticket, now_s: float) -> tuple[Path, Outlook] | Refusal:
        """What could be booked now."""
        demand, fleet = ticket.demand, self._books.fleet(now_s)
        shunned = self._shunned(now_s)
        exclude = to_avoid(fleet, demand.model, ticket.exclude, shunned)
        if self._baseline is not None:
            exclude = narrowed(self._baseline, fleet, demand.model, exclude)
        path = choose_path(demand, fleet, self._limits, exclude=exclude, parted=set(ticket.exclude) - shunned)
        if isinstance(path, Refusal):
            return path
        worked_off_s = self._books.worked_off_s(path.prefill, now_s)
        outlook = self._forecasts.outlook(demand, path, fleet, worked_off_s)
        is_tried = self._forecasts.is_tried(outlook, now_s)
        left_s = ticket.deadline_s - now_s
        return too_late(demand, path, outlook, fleet, left_s, self._limits, is_tried=is_tried) or (path, outlook)

    def _shunned(self, now_s: float) -> frozenset[str]:
        """Replicas that may hang, or fail too often."""
        return self._books.suspects(now_s) | self._breakers.open(now_s)

    def _refused(self, ticket: Ticket) -> Refusal:
        """What it is told that has to go: when its turn would come."""
        now_s = time.monotonic()
        fleet = self._books.fleet(now_s)
        exclude = to_avoid(fleet, ticket.demand.model, ticket.exclude, self._shunned(now_s))
        found = choose_path(ticket.demand, fleet, self._limits, exclude=exclude)
        before_s = drain_s(fleet, ticket.demand.model, self._room.work_before(ticket))
        if isinstance(found, Path):
            return Refusal(f"{ticket.demand.model!r}: others wait before it", max(self._limits.retry_after_s, before_s))
        if found.retry_after_s is None:
            return found
        return Refusal(found.reason, found.retry_after_s + before_s)
