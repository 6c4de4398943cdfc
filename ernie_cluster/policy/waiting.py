"""Requests that found no place and may wait for one: in which order, how many and how long. Reads no clock.

More urgent classes come first. Inside a class the tenant that was given least comes first, counted in tokens and pixels;
of its requests the one that must be finished soonest. Nobody overtakes whoever is first for a model: a large request
that fits nowhere yet would else wait for ever behind small ones. A request that cannot make it any more is turned away.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field

from ernie_cluster.config.cluster import RouterConfig
from ernie_cluster.policy.fleet import Fleet
from ernie_cluster.policy.snapshot import Demand

_arrivals = itertools.count()


@dataclass(frozen=True, slots=True, eq=False)
class Ticket:
    """One request that wants a place."""

    key: str
    demand: Demand
    exclude: Collection[str]
    deadline_s: float
    """When it must be finished, on the clock of `now_s`."""
    give_up_s: float
    """When it is turned away if it has no place by then."""
    number: int = field(default_factory=lambda: next(_arrivals))

    @classmethod
    def of(cls, key: str, demand: Demand, exclude: Collection[str], limits: RouterConfig, now_s: float) -> Ticket:
        """Of a request that arrives now."""
        return cls(key, demand, exclude, now_s + demand.timeout_s, now_s + patience_s(demand, limits))


def patience_s(demand: Demand, limits: RouterConfig) -> float:
    """How long a request may wait for a place: batch work does, interactive work is told at once when to come back."""
    return min(demand.timeout_s, limits.max_wait_s if demand.priority > 0 else limits.interactive_wait_s)


def work_of(demand: Demand, limits: RouterConfig) -> int:
    """What a request takes of its tenant's share, in tokens; those of a picture count for its pixels, too.

    100 tokens of which 60 are a picture's, and 50 to come, are 210.
    """
    return demand.num_prompt_tokens + demand.media_tokens + min(demand.max_tokens, limits.reserve_output_tokens)


def drain_s(fleet: Fleet, model: str, num_tokens: int) -> float:
    """How long the replicas of a model read so many tokens, all together; 0 when there are none to ask."""
    replicas = [r for role in ("prefill", "mixed") for r in fleet.pool(model, role).usable]
    rate = sum(1 / max(r.rates.token_s, 1e-9) for r in replicas)
    return num_tokens / rate if rate else 0.0


class WaitingRoom:
    """Owns the tickets of requests that wait, and what each tenant was given while somebody did."""

    def __init__(self, limits: RouterConfig) -> None:
        self._limits = limits
        self._tickets: dict[str, Ticket] = {}
        self._given: defaultdict[str, float] = defaultdict(float)

    def __len__(self) -> int:
        return len(self._tickets)

    @property
    def models(self) -> list[str]:
        """For which somebody waits."""
        return sorted({t.demand.model for t in self._tickets.values()})

    def enter(self, ticket: Ticket) -> bool:
        """Wait; False when the room is full."""
        if len(self._tickets) >= self._limits.max_waiting:
            return False
        tenants = {t.demand.tenant for t in self._tickets.values()}
        own = ticket.demand.tenant
        if tenants and own not in tenants:  # what it left unused while it asked for nothing is gone
            self._given[own] = max(self._given[own], min(self._given[t] for t in tenants))
        self._tickets[ticket.key] = ticket
        return True

    def leave(self, key: str) -> None:
        """A request waits no more; harmless when it did not."""
        if self._tickets.pop(key, None) is not None and not self._tickets:
            self._given.clear()

    def charge(self, demand: Demand) -> None:
        """A request was given a place; counts while others wait."""
        if self._tickets:
            self._given[demand.tenant] += work_of(demand, self._limits)

    def first(self, model: str) -> Ticket | None:
        """Whose turn it is."""
        return min((t for t in self._tickets.values() if t.demand.model == model), key=self._turn, default=None)

    def is_behind(self, ticket: Ticket) -> bool:
        """Whether others come before a request that is not here yet."""
        first = self.first(ticket.demand.model)
        return first is not None and self._turn(first) < self._turn(ticket)

    def expired(self, now_s: float) -> list[Ticket]:
        """Those who have waited for too long; they are still here."""
        return [t for t in self._tickets.values() if t.give_up_s <= now_s]

    def work_before(self, ticket: Ticket) -> int:
        """What comes before a request, in tokens."""
        turn, model = self._turn(ticket), ticket.demand.model
        before = (t.demand for t in self._tickets.values() if t.demand.model == model and self._turn(t) < turn)
        return sum(work_of(demand, self._limits) for demand in before)

    def _turn(self, ticket: Ticket) -> tuple[int, float, float, int]:
        demand = ticket.demand
        return demand.priority, self._given.get(demand.tenant, 0.0), ticket.deadline_s, ticket.number
