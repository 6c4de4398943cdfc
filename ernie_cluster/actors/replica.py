"""Life of one replica: its ranks start, register with the router, live and die together.

The Serve replica itself computes nothing; it is the conductor of its ranks, which are actors of their own in its
placement group. A rank that dies or whose engine stops makes the replica unhealthy, and Serve replaces it whole.
"""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ernie_cluster.actors import background
from ernie_cluster.actors.messages import NAMESPACE, ReplicaInfo
from ernie_cluster.actors.router import find_router
from ernie_cluster.config.cluster import ClusterConfig, Role
from ernie_cluster.errors import ErnieClusterError, ReplicaLost
from ernie_cluster.observe.log import setup_logging

log = logging.getLogger(__name__)

_REGISTER_S = 1.0
_DRAIN_TIMEOUT_S = 6.0
"""What running requests get to come to their end; Serve's own grace covers this, its pauses and the stop."""
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
        setup_logging(os.environ.get("ERNIE_LOG_LEVEL", "INFO"))
        self._router_args = (app, config)
        self._router = find_router(app, config)
        incarnation = uuid.uuid4().hex[:8]
        replica_id = f"{model}/{role}/{serve.get_replica_context().replica_id.unique_id}"
        actor_name = f"{app}:{replica_id}:{incarnation}"
        pool = next(p for p in config.model(model).pools if p.role == role)
        self._rank = self._start_rank(config, model, role, actor_name, pool.num_cpus, pool.num_gpus)
        try:
            ready = ray.get(self._rank.ready.remote())
        except RayActorError as e:
            raise ReplicaLost(f"{replica_id} could not start: {_root_of(e)}") from None
        self._info = ReplicaInfo(
            replica_id, incarnation, model, role, ready.node_id, actor_name, ready.address, ready.endpoint
        )
        log.info("%s is ready after %.1f s", replica_id, ready.load_s)
        self._failure: ErnieClusterError | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @staticmethod
    def _start_rank(
        config: ClusterConfig, model: str, role: Role, actor_name: str, num_cpus: float, num_gpus: float
    ) -> Any:
        if role == "vision":
            from ernie_cluster.actors.vision_rank import VisionRank

            kind: Any = VisionRank
        else:
            from ernie_cluster.actors.engine_rank import EngineRank

            kind = EngineRank
        strategy = PlacementGroupSchedulingStrategy(get_current_placement_group(), placement_group_bundle_index=0)
        options = kind.options(
            name=actor_name, namespace=NAMESPACE, num_cpus=num_cpus, num_gpus=num_gpus, scheduling_strategy=strategy
        )
        return options.remote(config, model, role, actor_name, num_cpus)

    async def check_health(self) -> None:
        """Called by Serve; raising replaces the replica."""
        if not self._tasks:
            self._tasks = [background.start(self._register()), background.start(self._watch())]
        if self._failure is not None:
            raise self._failure

    async def info(self) -> ReplicaInfo:
        return self._info

    async def _register(self) -> None:
        """Over and over: a router that was restarted learns of us within a second."""
        while self._failure is None:
            try:
                await self._router.register.remote(self._info)
            except Exception as e:
                log.info("the router does not answer, looking for it again: %s", e)
                self._router = find_router(*self._router_args)
            await asyncio.sleep(_REGISTER_S)

    async def _watch(self) -> None:
        """A snapshot each second notices a dead rank, or a live one whose engine has stopped."""
        while True:
            try:
                async with asyncio.timeout(10 * _REGISTER_S):
                    await self._rank.snapshot.remote()
            except Exception as e:
                log.error("%s has failed: %s", self._info.replica_id, e)
                self._failure = ReplicaLost(f"{self._info.replica_id} has failed: {e}")
                return
            await asyncio.sleep(_REGISTER_S)

    async def __del__(self) -> None:
        """Called by Serve: no new work, then what runs may end, then the rank gives its things back."""
        for task in self._tasks:
            task.cancel()
        for step, timeout_s in (
            (self._leave, _STOP_TIMEOUT_S),
            (self._drain, _DRAIN_TIMEOUT_S),
            (self._stop_rank, _STOP_TIMEOUT_S),
        ):
            try:
                async with asyncio.timeout(timeout_s):
                    await step()
            except Exception as e:
                log.info("stopping %s: %s", self._info.replica_id, e or type(e).__name__)
        ray.kill(self._rank)

    async def _leave(self) -> None:
        await self._router.deregister.remote(self._info.replica_id)

    async def _drain(self) -> None:
        while not (await self._rank.snapshot.remote()).is_idle:  # noqa: ASYNC110  another process says so
            await asyncio.sleep(_DRAIN_PAUSE_S)

    async def _stop_rank(self) -> None:
        await self._rank.stop.remote()


def _root_of(error: BaseException) -> str:
    """The last line of what a failed constructor said."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else repr(error)
