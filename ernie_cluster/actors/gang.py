"""The ranks of one replica, as actors in its placement group. They live and die together."""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ernie_cluster.actors.messages import NAMESPACE, Load, Meeting, RankArgs, Ready
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.parallel import Shard
from ernie_cluster.config.pool import PoolConfig


class Gang:
    """Owns the rank actors of a replica.

    Args:
        config: of the whole application.
        model: served name.
        pool: of the replica.
        actor_name: of its first rank; others have their number behind it.
    """

    def __init__(self, config: ClusterConfig, model: str, pool: PoolConfig, actor_name: str) -> None:
        self._dims = pool.dims
        group = get_current_placement_group()
        self._names, self._ranks, self._leaders = [], [], []
        self._followers: list[list[Any]] = []
        """Of each leader."""
        for rank in range(pool.dims.world):
            is_leader = pool.dims.coordinates(rank).tp_rank == 0
            name = actor_name if rank == 0 else f"{actor_name}:{rank}"
            options = _kind(pool.role, is_leader=is_leader).options(
                name=name,
                namespace=NAMESPACE,
                num_cpus=pool.num_cpus,
                num_gpus=pool.num_gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
            )
            args = RankArgs(config, model, pool.role, name, pool.num_cpus, Shard(pool.dims, rank))
            self._ranks.append(options.remote(args))
            if is_leader:
                self._leaders.append(self._ranks[-1])
                self._names.append(name)
                self._followers.append([])
            else:
                self._followers[-1].append(self._ranks[-1])

    def load(self) -> list[tuple[str, str, Ready]]:
        """Load all ranks side by side.

        Returns:
            (what tells this leader from the others in the replica's name, its actor's name, how it is reached) each.

        Raises:
            RayActorError, RayTaskError: a rank could not.
        """
        is_gang = self._dims.world > 1
        meeting: Meeting | None = ray.get(self._ranks[0].meet.remote()) if is_gang else None
        loading = [rank.load.remote(meeting) for rank in self._ranks]
        while loading:  # the first that fails says why; the others would wait for it
            done, loading = ray.wait(loading)
            ray.get(done)
        for leader, followers in zip(self._leaders, self._followers, strict=True):
            others = [e for e in ray.get([follower.endpoint.remote() for follower in followers]) if e is not None]
            if others:
                ray.get(leader.lead.remote(others))
        ready = ray.get([leader.ready.remote() for leader in self._leaders])
        lanes = [f"/{i}" if len(ready) > 1 else "" for i in range(len(ready))]
        return list(zip(lanes, self._names, ready, strict=True))

    async def snapshots(self) -> list[Load]:
        """Of every leader; raises when any rank is dead or has stopped."""
        loads = await asyncio.gather(*(rank.snapshot.remote() for rank in self._ranks))
        return [load for load in loads if load is not None]

    async def leave(self, within_s: float) -> None:
        """Leaders take no more for good, and part with what they still have after so many seconds."""
        await asyncio.gather(*(leader.leave.remote(within_s) for leader in self._leaders))

    async def stop(self) -> None:
        """Leaders give their things back, and dismiss the others."""
        await asyncio.gather(*(leader.stop.remote() for leader in self._leaders))
        await asyncio.gather(*(rank.stop.remote() for followers in self._followers for rank in followers))

    def kill(self) -> None:
        """At once, whatever they do."""
        for rank in self._ranks:
            ray.kill(rank)


def _kind(role: str, *, is_leader: bool) -> Any:
    if role == "vision":
        from ernie_cluster.actors.vision_rank import VisionRank

        return VisionRank
    if is_leader:
        from ernie_cluster.actors.engine_rank import EngineRank

        return EngineRank
    from ernie_cluster.actors.follower_rank import FollowerRank

    return FollowerRank
