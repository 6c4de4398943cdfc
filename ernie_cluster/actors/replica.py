"""Life of one replica: its ranks start, register with the router, live and die together.

The Serve replica itself computes nothing; it is the conductor of its ranks, which are actors of their own in its
placement group. A rank that dies or whose engine stops makes the replica unhealthy, and Serve replaces it whole.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from functools import partial

import ray
from ray import serve
from ray.exceptions import RayActorError, RayTaskError

from ernie_cluster.actors import background, process
from ernie_cluster.actors.find_router import find_router, renew_router
from ernie_cluster.actors.gang import Gang
from ernie_cluster.actors.messages import ReplicaInfo
from ernie_cluster.actors.notice import Notice
from ernie_cluster.actors.parting import HEARD_S
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.pool import Role
from ernie_cluster.errors import ErnieClusterError, ReplicaLost

log = logging.getLogger(__name__)

_REGISTER_S = 1.0
_FINISH_S = 6.0
"""What running requests get to come to their end; then others go on with them."""
_DRAIN_TIMEOUT_S = _FINISH_S + 3.0
"""Serve's own grace covers this, its pauses and the stop."""
_DRAIN_PAUSE_S = 0.1
_STOP_TIMEOUT_S = 3.0


class PoolReplica:
    """One replica of one pool.

    Args:
        app: name of the application.
        config: of the whole application.
        model: served name.
        role: of the pool.
    """

    def __init__(self, app: str, config: ClusterConfig, model: str, role: Role) -> None:
        process.log_lines()
        self._router_args = (app, config)
        find_router(app, config)  # its process starts meanwhile
        incarnation = uuid.uuid4().hex[:8]
        replica_id = f"{model}/{role}/{serve.get_replica_context().replica_id.unique_id}"
        actor_name = f"{app}:{replica_id}:{incarnation}"
        pool = next(p for p in config.model(model).pools if p.role == role)
        self._gang = Gang(config, model, pool, actor_name)
        try:
            ready = self._gang.load()
        except (RayActorError, RayTaskError) as e:
            raise ReplicaLost(f"{replica_id} could not start: {_root_of(e)}") from None
        self._router = renew_router(app, config)  # not before there is somebody who can do what it now wants
        self._id, version = replica_id, config.model(model).version
        self._infos = [
            ReplicaInfo(
                replica_id=f"{replica_id}{lane}",
                gang=replica_id,
                incarnation=incarnation,
                model=model,
                role=role,
                node_id=r.node_id,
                actor_name=name,
                address=r.address,
                endpoint=r.endpoint,
                version=version,
                started_s=time.time(),
            )
            for lane, name, r in ready
        ]
        """One for each group of ranks that takes requests of its own."""
        log.info("%s is ready after %.1f s", replica_id, max(r.load_s for _, _, r in ready))
        self._notice_s = config.router.notice_s
        self._failure: ErnieClusterError | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._leaving: asyncio.Task[None] | None = None

    async def check_health(self) -> None:
        """Called by Serve; raising replaces the replica."""
        if not self._tasks:
            self._notice = Notice(self._given_notice)
            self._tasks = [background.start(self._register()), background.start(self._watch())]
        if self._failure is not None:
            raise self._failure

    async def info(self) -> list[ReplicaInfo]:
        return self._infos

    async def _register(self) -> None:
        """Over and over: a router that was restarted learns of us within a second."""
        while self._failure is None:
            try:
                for info in self._infos:
                    if await self._router.register.remote(info):
                        self._leaving = background.start(self._end())
                        return
            except Exception as e:
                log.info("the router does not answer, looking for it again: %s", e)
                self._router = await asyncio.to_thread(find_router, *self._router_args)  # blocks while the GCS is away
            await asyncio.sleep(_REGISTER_S)

    async def _watch(self) -> None:
        """Snapshots each second notice a dead rank, or a live one whose engine has stopped."""
        while True:
            try:
                async with asyncio.timeout(10 * _REGISTER_S):
                    await self._gang.snapshots()
            except Exception as e:
                log.error("%s has failed: %s", self._id, e)
                self._failure = ReplicaLost(f"{self._id} has failed: {e}")
                return
            await asyncio.sleep(_REGISTER_S)

    async def _end(self) -> None:
        """The autoscaler wants this replica to stop, or an operator another one in its place, and it has nothing left to do.
        Serve, which keeps the pool's size until then, notices the end of the process."""
        log.info("%s is not needed any more", self._id)
        await self._stop()
        ray.kill(ray.get_runtime_context().current_actor)

    async def __del__(self) -> None:
        """Called by Serve."""
        await self._stop()

    async def _given_notice(self) -> None:
        """The machine is taken away: what runs here goes elsewhere at once."""
        async with asyncio.timeout(self._notice_s):
            await self._stop(finish_s=HEARD_S)

    async def _stop(self, finish_s: float = _FINISH_S) -> None:
        """No new work, then what runs may end or moves elsewhere, then the ranks give their things back."""
        for task in self._tasks:
            task.cancel()
        for step, timeout_s in (
            (partial(self._drain, finish_s), _DRAIN_TIMEOUT_S),
            (self._deregister, _STOP_TIMEOUT_S),
            (self._gang.stop, _STOP_TIMEOUT_S),
        ):
            try:
                async with asyncio.timeout(timeout_s):
                    await step()
            except Exception as e:
                log.info("stopping %s: %s", self._id, e or type(e).__name__)
        self._gang.kill()

    async def _deregister(self) -> None:
        for info in self._infos:
            await self._router.deregister.remote(info.replica_id)

    async def _drain(self, finish_s: float) -> None:
        """The ranks tell the router themselves, which still lets others fetch from their caches."""
        await self._gang.leave(finish_s)
        await asyncio.sleep(HEARD_S)
        while not all(load.is_idle for load in await self._gang.snapshots()):  # noqa: ASYNC110  others say so
            await asyncio.sleep(_DRAIN_PAUSE_S)


def _root_of(error: BaseException) -> str:
    """The last line of what a failed constructor said."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else repr(error)
