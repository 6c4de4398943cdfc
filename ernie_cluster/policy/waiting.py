"""Requests that found no place and may wait for one: in which order, how many and how long. Reads no clock.

More urgent classes come first, but for every so manyth place, which is batch work's. Inside a class the tenant that was given least comes first, counted in tokens and pixels;
of its requests the one that must be finished soonest. Nobody overtakes whoever is first for a model: a large request
that fits nowhere yet would else wait for ever behind small ones. A request that cannot have its first token before its
deadline any more is turned away at once, so that its turn goes to one that can.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field

from ernie_cluster.config.router import RouterConfig
from ernie_cluster.policy.cost import queue_s
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
    def of(
        cls,
        key: str,
        demand: Demand,
        exclude: Collection[str],
        limits: RouterConfig,
        now_s: float,
        wake_up_s: float = 0.0,
    ) -> Ticket:
        """Of a request that arrives now; `wake_up_s` as in `patience_s`."""
        patience = patience_s(demand, limits, wake_up_s)
        return cls(key, demand, exclude, now_s + demand.timeout_s, now_s + patience)


def patience_s(demand: Demand, limits: RouterConfig, wake_up_s: float = 0.0) -> float:
    """How long a request may wait for a place: batch work does, interactive work is told at once when to come back.

    Args:
        wake_up_s: all may wait this long, as its model has to be started first.
    """
    usual_s = limits.max_wait_s if demand.priority > 0 else limits.interactive_wait_s
    return min(demand.timeout_s, max(usual_s, wake_up_s))


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


class Outlook:
    """Which requests of one model that wait can still have their first token in time, by what its replicas tell.

    The best replica works off its queue, all of them together read what comes before, counted whole, and the fastest reads
    what is cached nowhere. Nothing stands in the way of a request while nobody is known who could read it.
    """

    def __init__(self, fleet: Fleet, model: str) -> None:
        pools = [fleet.pool(model, role) for role in ("prefill", "mixed")]
        replicas = [r for pool in pools for r in pool.usable]
        self._is_known = bool(replicas)
        self._among, self._holders = pools[0].mask | pools[1].mask, fleet.holders
        self._block_size = max((r.block_size for r in replicas), default=1)
        self._start_s = min(map(queue_s, replicas), default=0.0) + min((r.rates.chunk_s for r in replicas), default=0.0)
        self._token_s = min((r.rates.token_s for r in replicas), default=0.0)
        self._shared_token_s = drain_s(fleet, model, 1)

    def is_feasible(self, demand: Demand, tokens_before: int, left_s: float) -> bool:
        """Whether a first token is possible within `left_s`.

        Args:
            tokens_before: of prompts that wait with it and come first.
        """
        spare_s = left_s - self._start_s - tokens_before * self._shared_token_s
        if not self._is_known or spare_s >= demand.num_prompt_tokens * self._token_s:
            return True
        depth = next((n for n, _ in self._holders.trail(demand.chain).levels(self._among, 1)), 0)
        return spare_s >= (demand.num_prompt_tokens - depth * self._block_size) * self._token_s


@dataclass(frozen=True, slots=True)
class Held:
    """Requests of one model that wait for a place."""

    num_requests: int = 0
    media_tokens: int = 0
    """Of their pictures."""


class WaitingRoom:
    """Owns the tickets of requests that wait, and what each tenant was given while somebody did."""

    def __init__(self, limits: RouterConfig) -> None:
        self._limits = limits
        self._tickets: dict[str, Ticket] = {}
        self._given: defaultdict[str, float] = defaultdict(float)
        self._passed: defaultdict[str, int] = defaultdict(int)
        """By model: places that were given to others while its batch work waited."""

    def __len__(self) -> int:
        return len(self._tickets)

    def __contains__(self, key: str) -> bool:
        return key in self._tickets

    @property
    def models(self) -> list[str]:
        """For which somebody waits."""
        return sorted({t.demand.model for t in self._tickets.values()})

    def held(self) -> dict[str, Held]:
        """Those who wait, by model."""
        found: dict[str, Held] = {}
        for demand in (t.demand for t in self._tickets.values()):
            before = found.get(demand.model, Held())
            found[demand.model] = Held(before.num_requests + 1, before.media_tokens + demand.media_tokens)
        return found

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
            self._passed.clear()

    def charge(self, demand: Demand) -> None:
        """A request was given a place; counts while others wait."""
        if self._tickets:
            self._given[demand.tenant] += work_of(demand, self._limits)
        if demand.priority > 0:
            self._passed[demand.model] = 0
        elif any(t.demand.model == demand.model and t.demand.priority > 0 for t in self._tickets.values()):
            self._passed[demand.model] += 1

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

    def hopeless(self, fleet: Fleet, now_s: float) -> list[Ticket]:
        """Those whose first token would come after their deadline even if the other hopeless ones go; they are still here."""
        out, before, outlooks = list[Ticket](), defaultdict[str, int](int), dict[str, Outlook]()
        for ticket in sorted(self._tickets.values(), key=self._turn):
            demand = ticket.demand
            if demand.model not in outlooks:
                outlooks[demand.model] = Outlook(fleet, demand.model)
            if outlooks[demand.model].is_feasible(demand, before[demand.model], ticket.deadline_s - now_s):
                before[demand.model] += demand.num_prompt_tokens
            else:
                out.append(ticket)
        return out

    def work_before(self, ticket: Ticket) -> int:
        """What comes before a request, in tokens."""
        turn, model = self._turn(ticket), ticket.demand.model
        before = (t.demand for t in self._tickets.values() if t.demand.model == model and self._turn(t) < turn)
        return sum(work_of(demand, self._limits) for demand in before)

    def _turn(self, ticket: Ticket) -> tuple[int, bool, int, float, float, int]:
        demand, each = ticket.demand, self._limits.batch_turn
        is_due = demand.priority > 0 and 0 < each <= self._passed.get(demand.model, 0)
        given = self._given.get(demand.tenant, 0.0)
        return (
            0 if is_due else demand.priority, not is_due, demand.priority, given, ticket.deadline_s, ticket.number
        )  # fmt: skip
