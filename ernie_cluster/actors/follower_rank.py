"""The actor of a rank that only follows: weights, a share of the KV heads, and a thread that does what is announced.

Where its share of the KV is in memory of its own, hand-overs go to it and from it as to and from the leader.
"""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import ray

from ernie_cluster.actors import process
from ernie_cluster.actors.channels import Channels, Receivers, open_gpu, open_nixl, receive
from ernie_cluster.actors.messages import Meeting, RankArgs
from ernie_cluster.actors.notice import Notice
from ernie_cluster.errors import EngineFailed, GangBroken
from ernie_cluster.transport.base import Channel, Message
from ernie_cluster.transport.choose import Endpoint


@ray.remote(num_cpus=0, max_restarts=0)
class FollowerRank:
    """A rank of a gang that is not the first of its tensor-parallel group."""

    def __init__(self, args: RankArgs) -> None:
        process.share_interpreter()
        process.log_lines()
        self._args = args
        self._failure: EngineFailed | None = None
        self._receivers: Receivers | None = None
        self._channels: Channels | None = None

    async def load(self, meeting: Meeting | None) -> None:
        """Join the gang and load this rank's share; raises as `load_runner` does."""
        from ernie_cluster.actors.load_worker import join_gang, load_follower

        assert meeting is not None, "a follower has a gang"
        args, place = self._args, join_gang(self._args, meeting)

        def connect(peer: Endpoint) -> Channel:
            assert self._channels is not None
            return self._channels.to(peer)

        runner, follower = load_follower(args, place, connect)
        if follower is not None:
            transport = args.config.transport
            gpu = open_gpu(follower, runner.device, transport)
            nixl = open_nixl(transport)
            self._receivers = Receivers(follower, args.actor_name, transport, gpu, nixl)
            self._channels = self._receivers.channels()

        loop, self._released = asyncio.get_running_loop(), asyncio.Event()

        def follow() -> None:
            try:
                runner.follow(place.tp, *(() if follower is None else (follower.noted,)))
            except Exception as e:
                self._failure = e if isinstance(e, GangBroken) else EngineFailed(f"{type(e).__name__}: {e}")
            loop.call_soon_threadsafe(self._released.set)

        self._notice = Notice(self._given_notice)
        process.started()
        threading.Thread(target=follow, name="follower", daemon=True).start()

    async def endpoint(self) -> Endpoint | None:
        """How KV gets here; None where the leader takes all of it."""
        return None if self._receivers is None else self._receivers.endpoint

    async def deliver(self, message: Message, refs: list[Any]) -> Message:
        """A piece or an order that came through the object store."""
        assert self._receivers is not None
        return await receive(self._receivers, message, refs)

    async def stop(self) -> None:
        """Give the transports back; the leader has dismissed this rank."""
        for ways in (self._channels, self._receivers):
            if ways is not None:
                await asyncio.to_thread(ways.close)

    async def _given_notice(self) -> None:
        """Its leader needs this rank for what it still has to do; after that it is dismissed, or its leader gone."""
        async with asyncio.timeout(self._args.config.router.notice_s):
            await self._released.wait()

    async def snapshot(self) -> None:
        """Raises EngineFailed when this rank has stopped, so that its gang is replaced."""
        if self._failure is not None:
            raise self._failure
