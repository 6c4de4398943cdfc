"""The router: gathers what the replicas say of themselves, asks the policy, and books what was decided.

One named actor per application. Replicas register again and again, so a restarted router knows them within a second;
its snapshots come from the replicas themselves. It decides nothing: `policy.routing` does. The last word on KV blocks
is the replica's own lease table.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence

import ray

from ernie_cluster.actors import background, fault_desk, process
from ernie_cluster.actors.direct import Address, DirectServer, Method
from ernie_cluster.actors.messages import NAMESPACE, Ended, ReplicaInfo, Route
from ernie_cluster.actors.operations import Operations
from ernie_cluster.actors.queue import Queue
from ernie_cluster.actors.roster import Roster
from ernie_cluster.actors.scaler import Scaler, ServeState
from ernie_cluster.actors.visits import Bookings
from ernie_cluster.api.backend import ModelStatus, ReplicaExperts, ReplicaLoad
from ernie_cluster.api.operator import ClusterView, DecisionView, FaultsView, Order, ReplicaView
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.errors import Overloaded
from ernie_cluster.faults import FaultOrder, Faults
from ernie_cluster.policy.admission import Refusal
from ernie_cluster.policy.books import Books
from ernie_cluster.policy.breakers import Breakers
from ernie_cluster.policy.encoding import choose_encoder
from ernie_cluster.policy.forecast import Forecasts
from ernie_cluster.policy.scaling.observe import Observer
from ernie_cluster.policy.scaling.plan import Plan
from ernie_cluster.policy.snapshot import Demand, Promise, ReplicaSnapshot
from ernie_cluster.policy.trust import to_avoid
from ernie_cluster.policy.waiting import Ticket

log = logging.getLogger(__name__)

_SETTLE_S = 3.0
"""A router that has just started refuses nobody: replicas register once a second, so it cannot know them all yet."""
_SETTLE_PAUSE_S = 0.1
_EXPERTS_TIMEOUT_S = 5.0
"""For what only the ranks know."""
_IDLE_EXIT_S = 60.0
"""A router that nobody registers with or asks for this long belongs to no application any more."""


@ray.remote
class Router:
    """See the module."""

    def __init__(self, config: ClusterConfig) -> None:
        process.log_lines()
        self._config, self._limits = config, config.router
        self._faults = Faults.of(config.faults, "router", "router")
        self._books = Books(self._limits.heartbeat_timeout_s, self._limits.lease_timeout_s)
        self._breakers = Breakers(self._limits)
        self._roster = Roster(self._books, config)
        self._started_s = self._last_seen_s = time.monotonic()
        self._forecasts = Forecasts(self._limits)
        self._queue = Queue(
            self._books, self._limits, self._forecasts, self._breakers, settled_s=self._started_s + _SETTLE_S
        )
        self._observer = Observer(self._started_s)
        self._scaler = Scaler(config, self._roster, self._observer, self._queue.held)
        self._operations = Operations(config, self._books, self._roster, self._scaler)
        self._complete: set[str] = set()
        """Models that have had a replica of every kind."""
        self._tasks: list[asyncio.Task[None]] = []
        self._address: asyncio.Task[Address] | None = None
        process.started()

    async def has(self, config: ClusterConfig) -> bool:
        """Whether this is its configuration."""
        self._touch()
        return config == self._config

    async def address(self) -> Address:
        """Where it takes direct calls; a router that was started again has another one."""
        self._touch()
        if self._address is None:
            calls = (
                self.acquire, self.knock, self.acquire_encoder, self.opened, self.release, self.lost, self.status, self.loads,
                self.experts, self.cluster, self.decisions, self.order, self.faults,
            )  # fmt: skip
            methods: Mapping[str, Method] = {call.__name__: call for call in calls}
            methods = methods if self._faults is None else self._faults.guard("router", methods)
            server = DirectServer(methods, Bookings(methods, self._let_go).visit)
            self._address = background.start(server.start(ray.util.get_node_ip_address()))
        return await self._address

    async def register(self, info: ReplicaInfo) -> bool:
        """A replica is there, or still there; called every second by each. True: it is to end now."""
        self._touch()
        if self._faults is not None:
            await self._faults.meet_async("router.register")
        self._roster.register(info)
        return self._scaler.may_end(info.gang)

    async def deregister(self, replica_id: str) -> None:
        """A replica is going away: no new work for it."""
        self._touch()
        self._roster.forget(replica_id)

    async def exchange(self, serve: ServeState, kept: Plan | None) -> Plan | None:
        """See `Scaler.exchange`."""
        self._touch()
        return self._scaler.exchange(serve, kept)

    async def acquire(self, key: str, demand: Demand, exclude: Sequence[str], timeout_s: float) -> Route:
        """Decide the whole path of one attempt and book it.

        Args:
            key: names the attempt; what was booked under it before is let go.
            exclude: replicas that failed this request before.
            timeout_s: the booking lapses after this.

        Raises:
            Overloaded: no path has room now, nor soon enough for a request that may wait.
        """
        self._touch()
        self._books.release(key)
        wake_up_s = self._config.wake_up_s(demand.model) if self._scaler.sleeps(demand.model) else 0.0
        ticket = Ticket.of(key, demand, frozenset(exclude), self._limits, time.monotonic(), wake_up_s)
        try:
            path = await self._queue.place(ticket, timeout_s)
        except Overloaded:
            self._observer.offered(demand, None)
            raise
        self._observer.offered(demand, path.promises)
        infos = self._roster.infos
        while not infos.keys() >= {promise.replica_id for promise in path.promises}:  # lost since then
            self._books.release(key)
            path = await self._queue.place(ticket, timeout_s)
        log.debug("%s: %s", key, "; ".join(path.reasons))
        return Route(
            path,
            tuple(infos[share.encoder] for share in path.encoders),
            infos[path.prefill],
            None if path.is_mixed else infos[path.decode],
            infos.get(path.fetch.source) if path.fetch else None,
        )

    async def knock(self, demand: Demand) -> None:
        """Raises Overloaded for what would be refused now and may not wait; books nothing."""
        self._touch()
        if self._scaler.sleeps(demand.model):
            return
        refusal = self._queue.knock(Ticket.of("", demand, frozenset(), self._limits, time.monotonic()))
        if refusal is not None:
            self._observer.offered(demand, None)
            raise refusal.to_error()

    async def acquire_encoder(self, key: str, demand: Demand, exclude: Sequence[str], timeout_s: float) -> ReplicaInfo:
        """Decide which vision replica encodes pictures that belong to no prompt, and book it.

        Arguments and errors as of `acquire`.
        """
        self._touch()
        self._books.release(key)
        promise = await self._encoder(demand, exclude)
        self._breakers.chosen((promise.replica_id,), time.monotonic())
        self._books.promise(key, (promise,), time.monotonic() + timeout_s)
        return self._roster.infos[promise.replica_id]

    async def opened(self, key: str, replica_ids: Sequence[str]) -> None:
        """The replicas hold now what was booked; their own next snapshots will show it."""
        for replica_id in replica_ids:
            self._books.confirm(key, replica_id, time.monotonic())

    async def release(self, model: str, attempts: Sequence[Ended]) -> None:
        """Attempts of one model's requests that are over."""
        now_s = time.monotonic()
        for ended in attempts:
            self._observer.ended(model, ended.ttft_s, ended.tpot_s)
            self._forecasts.learn(ended.key, ended.path_ttft_s, ended.tpot_s, ended.output_tokens, now_s)
            self._let_go(ended.key)
            for replica_id in ended.served:
                self._breakers.succeeded(replica_id)

    def _let_go(self, key: str) -> None:
        """What is booked under a key, or waits to be."""
        self._books.release(key)
        self._queue.give_up(key)

    async def lost(self, replica_id: str) -> bool:
        """A client could not reach a replica, or its engine failed: no work for it until it answers again, where others
        can do it. True: it has failed so often that it is left alone for a while even then."""
        self._roster.suspect(replica_id)
        return self._breakers.failed(replica_id, time.monotonic())

    async def replicas(self) -> list[tuple[ReplicaInfo, ReplicaSnapshot | None]]:
        """All that is known, for status pages and tests."""
        view = {s.replica_id: s for s in self._books.view(time.monotonic())}
        return [(info, view.get(key)) for key, info in sorted(self._roster.infos.items())]

    async def status(self) -> list[ModelStatus]:
        """Which models have a replica of every role that they need."""
        self._touch()
        return self._status()

    async def cluster(self) -> ClusterView:
        """See `api.operator.Operations`, and so the next two."""
        self._touch()
        return self._operations.cluster(self._status(), time.monotonic())

    async def decisions(self) -> list[DecisionView]:
        self._touch()
        return self._operations.decisions()

    async def order(self, order: Order) -> ReplicaView:
        self._touch()
        return await self._operations.order(order, time.monotonic())

    async def faults(self, order: FaultOrder) -> FaultsView:
        """See `fault_desk.obey`."""
        self._touch()
        return await fault_desk.obey(order, self._faults, self._roster.infos)

    async def loads(self) -> list[ReplicaLoad]:
        """What each replica that takes new work has to do."""
        self._touch()
        return [
            ReplicaLoad(
                model=s.model,
                role=s.role,
                replica=s.replica_id,
                num_running=s.num_running,
                num_waiting=s.num_waiting,
                waiting_tokens=s.waiting_tokens,
                free_blocks=s.free_blocks,
                total_blocks=s.total_blocks,
                experts=s.experts,
            )
            for s in self._books.view(time.monotonic())
            if s.is_usable
        ]

    async def experts(self) -> list[ReplicaExperts]:
        """Use and place of every expert of each replica that takes new work and has some."""
        self._touch()
        infos = [
            self._roster.infos[s.replica_id] for s in self._books.view(time.monotonic()) if s.is_usable and s.experts
        ]
        async with asyncio.timeout(_EXPERTS_TIMEOUT_S):
            layers = await asyncio.gather(*(ray.get_actor(i.actor_name, NAMESPACE).experts.remote() for i in infos))
        return [ReplicaExperts(i.model, i.role, i.replica_id, own) for i, own in zip(infos, layers, strict=True)]

    async def check(self) -> int:
        """Invariants of the books; how many promises are open."""
        self._books.check()
        return self._books.num_promises

    async def _encoder(self, demand: Demand, exclude: Sequence[str]) -> Promise:
        """What the policy decides now, or while this router is young: soon; raises its refusal."""
        while True:
            now_s = time.monotonic()
            fleet = self._books.fleet(now_s)
            shunned = self._books.suspects(now_s) | self._breakers.open(now_s)
            avoid = to_avoid(fleet, demand.model, exclude, shunned)
            found = choose_encoder(demand, fleet, self._limits, exclude=avoid)
            if not isinstance(found, Refusal):
                return found
            if time.monotonic() - self._started_s > _SETTLE_S:
                raise found.to_error()
            await asyncio.sleep(_SETTLE_PAUSE_S)

    def _status(self) -> list[ModelStatus]:
        now_s = time.monotonic()
        suspects = self._books.suspects(now_s)
        view = [s for s in self._books.view(now_s) if s.replica_id not in suspects]
        out = []
        for model in self._config.models:
            if self._scaler.was_put_to_sleep(model.name):
                self._complete.add(model.name)  # or a router before this one would not have
            if model.name in self._complete and self._scaler.sleeps(model.name):
                out.append(ModelStatus(model.name, True, "asleep; the next request wakes it"))
                continue
            missing = model.missing({s.role for s in view if s.model == model.name and s.is_usable})
            detail = "waiting for a replica of: " + ", ".join(missing) if missing else ""
            out.append(ModelStatus(model.name, not missing, detail))
            if not missing:
                self._complete.add(model.name)
        return out

    def _touch(self) -> None:
        self._last_seen_s = time.monotonic()
        if not self._tasks:
            self._tasks = [background.start(self._exit_when_idle()), background.start(self._scaler.run())]

    async def _exit_when_idle(self) -> None:
        while (left_s := self._last_seen_s + _IDLE_EXIT_S - time.monotonic()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(left_s)
        ray.actor.exit_actor()
