"""The autoscaler at work: looks once a second, asks the policy, begins what it says, and sees it through.

It lives in the router's process, whose books it shares. Roles it changes itself; the number of replicas of a pool is Serve's
to keep, whose controller asks for the plan several times a second (`actors.planned`) and holds a copy of it, from which a
router that was started again goes on.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ernie_cluster.actors import background
from ernie_cluster.actors.roster import Roster
from ernie_cluster.api.operator import DecisionView
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.pool import can_serve
from ernie_cluster.errors import ErnieClusterError
from ernie_cluster.policy.scaling.actions import Action, SwitchRole
from ernie_cluster.policy.scaling.decide import Decision, decide
from ernie_cluster.policy.scaling.memory import Memory
from ernie_cluster.policy.scaling.observe import Observer
from ernie_cluster.policy.scaling.plan import Gang, Plan, PoolKey, pool_of
from ernie_cluster.policy.scaling.said import said
from ernie_cluster.policy.scaling.snapshot import Phase, ReplicaState, ScalingSnapshot
from ernie_cluster.policy.waiting import Held

log = logging.getLogger(__name__)

_MAX_ENTRIES = 1000
_MAX_LOOKS = 10
_NOTE_PAUSE_S = 60.0
"""A note that was made is not made again for so long."""

ServeState = Mapping[PoolKey, tuple[int, tuple[str, ...]]]
"""Of each pool: how many replicas Serve keeps, and the ids of those that are alive."""


class Scaler:
    """Owns the plan, and the log of what was decided.

    Args:
        held: requests that wait for a place, by model.
    """

    def __init__(
        self, config: ClusterConfig, roster: Roster, observer: Observer, held: Callable[[], Mapping[str, Held]]
    ) -> None:
        self._config, self._roster, self._observer, self._held = config, roster, observer, held
        self._bounds = config.bounds()
        self.gpus: dict[PoolKey, float] = {(m.name, p.role): config.holds(p) for m in config.models for p in m.pools}
        """That one replica of each pool holds."""
        self._plan: Plan | None = None if config.scaling else Plan({})
        self._running: frozenset[str] | None = None
        """Gangs that Serve runs, None until it has told of all pools."""
        self._memory = Memory()
        self._drained_by: dict[str, float] = {}
        """When each gang that is to stop is stopped, whatever it does."""
        self._restarting: dict[str, float] = {}
        """Gangs that an operator wants replaced, and when each ends whatever it does."""
        self._noted: dict[str, float] = {}
        self._orders: set[asyncio.Task[None]] = set()
        self.log: deque[DecisionView] = deque(maxlen=_MAX_ENTRIES)
        """Newest first."""
        self.looks: deque[ScalingSnapshot] = deque(maxlen=_MAX_LOOKS)
        """The last ones, newest last."""
        self.decision: Decision | None = None
        """The last one; None where nothing scales."""

    def coming(self) -> list[tuple[str, ReplicaState]]:
        """(model, replica) of each that has been asked for and is not there yet, or not again."""
        states = (self._plan or Plan({})).states(self._gangs(), self.gpus)
        return [(model, r) for model, those in states.items() for r in those if r.phase in ("starting", "silent")]

    def phase(self, gang: Gang) -> Phase:
        """What a replica is in the middle of."""
        return (self._plan or Plan({})).phase(gang)

    def exchange(self, serve: ServeState, kept: Plan | None) -> Plan | None:
        """What Serve's controller tells and asks; None until it has told of all pools.

        Args:
            kept: the plan that it got last, None when it has just begun.
        """
        if not serve.keys() >= self.gpus.keys():
            return self._plan
        self._running = frozenset(gang_id for _, running in serve.values() for gang_id in running)
        if self._plan is None:
            self._plan = kept or Plan({pool: target for pool, (target, _) in serve.items()})
            log.info("the autoscaler begins with %s", dict(self._plan.counts))
        return self._plan

    def may_end(self, gang_id: str) -> bool:
        """Whether a replica is to end now: it was to stop or be replaced, and has finished or had its time."""
        until_s = self._restarting.get(gang_id)
        if until_s is None:
            if self._plan is None or gang_id not in self._plan.stopping:
                return False
            until_s = self._drained_by.get(gang_id, math.inf)
        is_over = time.monotonic() >= until_s
        return is_over or self._roster.is_done(gang_id)

    def sleeps(self, model: str) -> bool:
        """Whether a model that may be scaled to zero serves nothing now."""
        if not self._config.wake_up_s(model):
            return False
        return not can_serve(self._roster.roles(model))

    def was_put_to_sleep(self, model: str) -> bool:
        """Whether a model has no replicas by plan, and none to come."""
        if self._plan is None or not self._config.wake_up_s(model):
            return False
        coming = {m.model for m in self._plan.moves} | {name for (name, _), n in self._plan.counts.items() if n}
        return model not in coming

    async def run(self) -> None:
        """Look and decide for ever."""
        interval_s = self._config.scaling.interval_s if self._config.scaling else 1.0
        while True:
            await asyncio.sleep(interval_s)
            try:
                self.step(time.monotonic())
            except Exception:  # the router must go on, and the next look may be better
                log.exception("the autoscaler failed to decide")

    def step(self, now_s: float) -> None:
        """One look, and what follows from it."""
        if self._plan is None or (self._config.scaling and self._running is None):
            self._look({model: [] for model, _ in self.gpus}, now_s)
            return
        gangs = self._gangs()
        begun = self._plan.within([g for g in gangs if g.is_listed])
        for gang_id in sorted(begun.stopping - self._plan.stopping):
            log.info("%s had started when it was given up: it stops", gang_id)
        self._plan = begun.settled(gangs)
        snapshot = self._look(self._plan.states(gangs, self.gpus), now_s)
        if self._config.scaling is None:
            return
        self.decision = decide(snapshot, self._bounds, self._memory, now_s)
        self._memory = self.decision.memory
        for action in self.decision.actions:
            self._begin(action, gangs)
        for note in self.decision.notes:
            self._note(note, now_s)
        self._drain(gangs, now_s, self._config.scaling.drain_timeout_s)

    def _gangs(self) -> list[Gang]:
        """Those that have registered, and those that Serve runs besides."""
        known = [
            replace(
                g,
                is_listed=g.gang_id in (self._running or ()),
                is_leaving=g.is_leaving or g.gang_id in self._restarting,
            )
            for g in self._roster.gangs()
        ]
        silent = (self._running or frozenset()) - {g.gang_id for g in known}
        found = [(gang_id, pool_of(gang_id)) for gang_id in sorted(silent)]
        return known + [Gang(i, *pool, pool[1], is_silent=True) for i, pool in found if pool in self.gpus]

    def _look(self, states: Mapping[str, list[ReplicaState]], now_s: float) -> ScalingSnapshot:
        snapshot = self._observer.look(states, self._roster.lanes(), self._held(), now_s)
        self.looks.append(snapshot)
        return snapshot

    def _begin(self, action: Action, gangs: Sequence[Gang]) -> None:
        assert self._plan is not None
        self._plan = self._plan.after(action, gangs)
        words = said(action)
        self.log.appendleft(
            DecisionView(time.time(), words.model, words.name, words.replicas, words.detail, words.reason)
        )
        log.info("%s %s: %s (%s)", words.model, words.name, words.detail, words.reason)
        if isinstance(action, SwitchRole):
            for replica_id in {g.gang_id for g in gangs}.intersection(action.replica_ids):
                self._order(self._roster.tell(replica_id, role=action.target))

    def _drain(self, gangs: Sequence[Gang], now_s: float, within_s: float) -> None:
        """Tell those that are to stop, also again: one that was lost for a while, or that a router before this one chose."""
        assert self._plan is not None
        for gang in gangs:
            if gang.gang_id in self._plan.stopping and not (gang.is_draining or gang.is_silent):
                self._order(self._roster.tell(gang.gang_id, is_draining=True, within_s=within_s))
        self._drained_by = {i: self._drained_by.get(i, now_s + within_s) for i in self._plan.stopping}

    def keep(self, gang: Gang) -> None:
        """An operator wants a replica to go on that was to stop, or to be replaced."""
        self._restarting.pop(gang.gang_id, None)
        if self._plan is not None:
            self._plan = self._plan.kept(gang)

    def restart(self, gang: Gang, until_s: float) -> None:
        """An operator wants a replica, which drains, to end; Serve begins another one in its place."""
        known = {g.gang_id for g in self._roster.gangs()}
        self._restarting = {g: s for g, s in self._restarting.items() if g in known} | {gang.gang_id: until_s}

    def switched(self, gang: Gang, now_s: float) -> None:
        """An operator has given a replica, that was `gang`, another role; that is not taken back at once."""
        self._memory = self._memory.switched(gang.model, gang.role, now_s)
        if self._plan is not None:
            self._plan = self._plan.given_role(gang.gang_id)

    def _note(self, note: str, now_s: float) -> None:
        if now_s - self._noted.get(note, -_NOTE_PAUSE_S) >= _NOTE_PAUSE_S:
            self._noted = {n: s for n, s in self._noted.items() if now_s - s < _NOTE_PAUSE_S}
            self._noted[note] = now_s
            self.log.appendleft(DecisionView(time.time(), "", "note", (), "nothing was changed", note))
            log.info("autoscaler: %s", note)

    def _order(self, order: Coroutine[Any, Any, None]) -> None:
        async def quietly() -> None:
            try:
                await order
            except (ErnieClusterError, TimeoutError, ConnectionError) as e:  # it is told again, or is gone
                log.info("an order was not confirmed: %s", e)

        task = background.start(quietly())
        self._orders.add(task)
        task.add_done_callback(self._orders.discard)
