"""The router: gathers what the replicas say of themselves, asks the policy, and books what was decided.

One named actor per application. Replicas register again and again, so a restarted router knows them within a second;
its snapshots come from the replicas themselves. It decides nothing: `policy.routing` does. The last word on KV blocks
is the replica's own lease table.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import ray

from ernie_cluster.actors import background
from ernie_cluster.actors.direct import Address, DirectServer
from ernie_cluster.actors.messages import NAMESPACE, Load, ReplicaInfo, Route
from ernie_cluster.api.backend import ModelStatus, ReplicaExperts, ReplicaLoad
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.policy.admission import Refusal
from ernie_cluster.policy.routing import choose_encoder, choose_path
from ernie_cluster.policy.snapshot import Books, Demand, ReplicaSnapshot

log = logging.getLogger(__name__)

T = TypeVar("T")

_SETTLE_S = 3.0
"""A router that has just started refuses nobody: replicas register once a second, so it cannot know them all yet."""
_SETTLE_PAUSE_S = 0.1
_IDLE_EXIT_S = 60.0
"""A router that nobody registers with or asks for this long belongs to no application any more."""


def router_name(app: str) -> str:
    return f"{app}:router"


def find_router(app: str, config: ClusterConfig) -> Any:
    """Handle of the application's router, which is started when there is none."""
    return Router.options(  # type: ignore[attr-defined]
        name=router_name(app),
        namespace=NAMESPACE,
        get_if_exists=True,
        lifetime="detached",
        max_restarts=-1,
        num_cpus=0,
        scheduling_strategy="DEFAULT",  # not in the placement group of the replica that misses it, to go with it
    ).remote(config)


@ray.remote
class Router:
    """See the module."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config, self._limits = config, config.router
        self._books = Books(self._limits.heartbeat_timeout_s)
        self._replicas: dict[str, ReplicaInfo] = {}
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._started_s = self._last_seen_s = time.monotonic()
        self._idle_watch: asyncio.Task[None] | None = None
        self._address: asyncio.Task[Address] | None = None

    async def address(self) -> Address:
        """Where it takes direct calls; a router that was started again has another one."""
        self._touch()
        if self._address is None:
            calls = (
                self.acquire, self.acquire_encoder, self.opened, self.release, self.lost, self.status, self.loads,
                self.experts,
            )  # fmt: skip
            server = DirectServer({call.__name__: call for call in calls})
            self._address = background.start(server.start(ray.util.get_node_ip_address()))
        return await self._address

    async def register(self, info: ReplicaInfo) -> None:
        """A replica is there, or still there; called every second by each."""
        self._touch()
        known = self._replicas.get(info.replica_id)
        if known is not None and known.incarnation == info.incarnation:
            return
        log.info("%s %s is there (incarnation %s)", info.role, info.replica_id, info.incarnation)
        self._forget(info.replica_id)
        self._replicas[info.replica_id] = info
        self._watchers[info.replica_id] = background.start(self._watch(info))

    async def deregister(self, replica_id: str) -> None:
        """A replica is going away: no new work for it."""
        self._touch()
        self._forget(replica_id)

    async def acquire(self, key: str, demand: Demand, exclude: Sequence[str], timeout_s: float) -> Route:
        """Decide the whole path of one attempt and book it.

        Args:
            key: names the attempt; what was booked under it before is let go.
            exclude: replicas that failed this request before.
            timeout_s: the booking lapses after this.

        Raises:
            Overloaded: no path has room now.
        """
        self._touch()
        self._books.release(key)
        path = await self._settled(partial(choose_path, demand), exclude)
        self._books.promise(key, path.promises, time.monotonic() + timeout_s)
        log.debug("%s: %s", key, "; ".join(path.reasons))
        return Route(
            path,
            self._replicas[path.encoder] if path.encoder else None,
            self._replicas[path.prefill],
            None if path.is_mixed else self._replicas[path.decode],
        )

    async def acquire_encoder(
        self, key: str, model: str, num_tokens: int, exclude: Sequence[str], timeout_s: float
    ) -> ReplicaInfo:
        """Decide which vision replica encodes a picture that belongs to no prompt, and book it.

        Arguments and errors as of `acquire`; `num_tokens` are the picture's.
        """
        self._touch()
        self._books.release(key)
        promise = await self._settled(partial(choose_encoder, model, num_tokens), exclude)
        self._books.promise(key, (promise,), time.monotonic() + timeout_s)
        return self._replicas[promise.replica_id]

    async def opened(self, key: str, replica_ids: Sequence[str]) -> None:
        """The replicas hold now what was booked; their own next snapshots will show it."""
        for replica_id in replica_ids:
            self._books.confirm(key, replica_id, time.monotonic())

    async def release(self, keys: Sequence[str]) -> None:
        """Attempts that are over."""
        for key in keys:
            self._books.release(key)

    async def lost(self, replica_id: str) -> None:
        """A client could not reach a replica: no work for it until it answers again."""
        self._forget(replica_id)

    async def replicas(self) -> list[tuple[ReplicaInfo, ReplicaSnapshot | None]]:
        """All that is known, for status pages and tests."""
        view = {s.replica_id: s for s in self._books.view(time.monotonic())}
        return [(info, view.get(key)) for key, info in sorted(self._replicas.items())]

    async def status(self) -> list[ModelStatus]:
        """Which models have a replica of every role that they need."""
        self._touch()
        view = self._books.view(time.monotonic())
        out = []
        for model in self._config.models:
            roles = {s.role for s in view if s.model == model.name and s.is_usable}
            missing = [p.role for p in model.pools if p.role not in roles]
            detail = "waiting for a replica of: " + ", ".join(missing) if missing else ""
            out.append(ModelStatus(model.name, not missing, detail))
        return out

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
        infos = [self._replicas[s.replica_id] for s in self._books.view(time.monotonic()) if s.is_usable and s.experts]
        async with asyncio.timeout(self._limits.heartbeat_timeout_s):
            layers = await asyncio.gather(*(ray.get_actor(i.actor_name, NAMESPACE).experts.remote() for i in infos))
        return [ReplicaExperts(i.model, i.role, i.replica_id, own) for i, own in zip(infos, layers, strict=True)]

    async def check(self) -> int:
        """Invariants of the books; how many promises are open."""
        self._books.check()
        return self._books.num_promises

    async def _settled(self, choose: Callable[..., T | Refusal], exclude: Sequence[str]) -> T:
        """What the policy decides now, or while this router is young: soon; raises its refusal."""
        while True:
            found = choose(self._books.view(time.monotonic()), self._limits, exclude=frozenset(exclude))
            if not isinstance(found, Refusal):
                return found
            if time.monotonic() - self._started_s > _SETTLE_S:
                raise found.to_error()
            await asyncio.sleep(_SETTLE_PAUSE_S)

    def _touch(self) -> None:
        self._last_seen_s = time.monotonic()
        if self._idle_watch is None:
            self._idle_watch = background.start(self._exit_when_idle())

    def _forget(self, replica_id: str) -> None:
        self._replicas.pop(replica_id, None)
        self._books.forget(replica_id)
        watcher = self._watchers.pop(replica_id, None)
        if watcher is not None:
            watcher.cancel()

    async def _watch(self, info: ReplicaInfo) -> None:
        """Ask one replica for its load, over and over; forget it when it does not answer in time."""
        try:
            actor = ray.get_actor(info.actor_name, NAMESPACE)
            while True:
                asked = time.monotonic()
                async with asyncio.timeout(self._limits.heartbeat_timeout_s):
                    load = await actor.snapshot.remote()
                now = time.monotonic()
                self._books.report(self._snapshot(info, load, age_s=now - asked), now)
                await asyncio.sleep(self._limits.snapshot_interval_s)
        except asyncio.CancelledError:
            raise
        except Exception as e:  # dead, stuck, or its engine has stopped: it registers again when it is well
            log.warning("%s does not answer: %s", info.replica_id, e)
            self._watchers.pop(info.replica_id, None)
            self._forget(info.replica_id)

    def _snapshot(self, info: ReplicaInfo, load: Load, age_s: float) -> ReplicaSnapshot:
        return ReplicaSnapshot(
            replica_id=info.replica_id,
            model=info.model,
            role=info.role,
            node_id=info.node_id,
            incarnation=info.incarnation,
            is_ready=True,
            is_draining=False,
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            waiting_tokens=load.waiting_tokens,
            free_blocks=load.free_blocks,
            total_blocks=load.total_blocks,
            block_size=self._config.model(info.model).engine.block_size,
            age_s=age_s,
            experts=load.experts,
        )

    async def _exit_when_idle(self) -> None:
        while (left_s := self._last_seen_s + _IDLE_EXIT_S - time.monotonic()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(left_s)
        ray.actor.exit_actor()
