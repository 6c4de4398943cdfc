"""The API's side of an engine's outcomes: one poll always under way per engine, fanned out to the attempts."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from ray.exceptions import RayActorError

from ernie_cluster.actors import background
from ernie_cluster.actors.direct import DirectPeer, RemoteFailure
from ernie_cluster.actors.merge import Failure, News
from ernie_cluster.actors.messages import Batch, ReplicaInfo
from ernie_cluster.actors.router import find_router
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.errors import EngineFailed, ErnieClusterError, ReplicaLost
from ernie_cluster.request import RequestFailed

log = logging.getLogger(__name__)

_POLL_TIMEOUT_S = 10.0
"""An engine that leaves a poll without any answer for this long is taken for lost."""


def translate(error: BaseException, where: str) -> Exception:
    """An exception that came out of a call, as one of our tree.

    Args:
        where: who was called, for the message.
    """
    if isinstance(error, RemoteFailure):
        return error.error
    if isinstance(error, ErnieClusterError):
        return error
    if isinstance(error, RayActorError):
        return ReplicaLost(f"{where} is gone")
    if isinstance(error, TimeoutError):
        return ReplicaLost(f"{where} does not answer")
    return EngineFailed(f"{where}: {type(error).__name__}: {error}")


def failure_of(error: BaseException, replica_id: str) -> Failure:
    """What a failed call of a replica means for the attempt."""
    return Failure(replica_id, translate(error, replica_id), is_told=isinstance(error, RemoteFailure))


class Line:
    """A connection that is made when it is first needed, and again after it was lost.

    Args:
        connect: makes one, or raises.
    """

    def __init__(self, connect: Callable[[], Coroutine[Any, Any, DirectPeer]]) -> None:
        self._connect = connect
        self._peer: asyncio.Task[DirectPeer] | None = None

    async def call(self, method: str, *args: Any) -> Any:
        """See `DirectPeer.call`; raises what `connect` raises, too."""
        if self._peer is None or _is_over(self._peer):
            self._peer = background.start(self._connect())
        peer = await asyncio.shield(self._peer)  # others may wait for it as well
        return await peer.call(method, *args)

    async def close(self) -> None:
        if self._peer is not None:
            self._peer.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await (await self._peer).close()


def _is_over(peer: asyncio.Task[DirectPeer]) -> bool:
    return peer.done() and (peer.cancelled() or peer.exception() is not None or peer.result().is_lost)


def router_line(app: str, config: ClusterConfig) -> Line:
    """To the application's router, which is started when there is none."""

    async def connect() -> DirectPeer:
        return await DirectPeer.connect(await find_router(app, config).address.remote(), "the router")

    return Line(connect)


class Link:
    """One replica, seen from one API replica.

    Args:
        info: the replica.
        client_id: of this API replica.
    """

    def __init__(self, info: ReplicaInfo, client_id: str) -> None:
        self.info, self._client_id = info, client_id
        self._line = Line(lambda: DirectPeer.connect(info.address, info.replica_id))
        self._queues: dict[str, asyncio.Queue[News]] = {}
        self._poller: asyncio.Task[None] | None = None
        self.is_lost = False
        """Its polls have failed; a new link is needed."""

    async def call(self, method: str, *args: Any) -> Any:
        """See `Line.call`."""
        return await self._line.call(method, *args)

    def subscribe(self, key: str, queue: asyncio.Queue[News]) -> None:
        """Outcomes of this attempt go to `queue` from now on; a vision replica has none beside its call's result."""
        self._queues[key] = queue
        if self._poller is None and self.info.role != "vision":
            self._poller = background.start(self._poll())

    def unsubscribe(self, key: str) -> None:
        self._queues.pop(key, None)

    async def close(self) -> None:
        if self._poller is not None:
            self._poller.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._poller
        await self._line.close()

    async def _poll(self) -> None:
        acknowledged = 0
        try:
            while True:
                async with asyncio.timeout(_POLL_TIMEOUT_S):
                    batch: Batch = await self.call("poll", self._client_id, acknowledged)
                acknowledged = batch.number
                for outcome in batch.outcomes:
                    queue = self._queues.get(outcome.request_id)
                    if queue is None:
                        continue  # its client has left
                    if isinstance(outcome, RequestFailed):
                        queue.put_nowait(Failure(self.info.replica_id, outcome.error, is_told=True))
                    else:
                        queue.put_nowait(outcome)
        except Exception as e:
            self.is_lost = True
            failure = failure_of(e, self.info.replica_id)
            log.warning("lost %s: %s", self.info.replica_id, failure.error)
            for queue in self._queues.values():
                queue.put_nowait(failure)
