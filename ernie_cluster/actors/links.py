"""The API's side of a replica's outcomes: while anybody waits for some, one poll is under way, fanned out to the attempts.

Whoever lives answers a poll soon, if only to say that there is nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import ray
from ray.exceptions import RayActorError

from ernie_cluster.actors import background
from ernie_cluster.actors.direct import DirectPeer, RemoteFailure
from ernie_cluster.actors.find_router import find_router
from ernie_cluster.actors.merge import Failure, News
from ernie_cluster.actors.messages import Batch, ReplicaInfo
from ernie_cluster.actors.patience import answered
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.errors import EngineFailed, ErnieClusterError, ReplicaLost
from ernie_cluster.request import RequestFailed

log = logging.getLogger(__name__)


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
        self._is_closed = False

    async def call(self, method: str, *args: Any) -> Any:
        """See `DirectPeer.call`; raises what `connect` raises, too."""
        if self._is_closed:
            raise ReplicaLost("the connection is closed")
        if self._peer is None or _is_over(self._peer):
            self._peer = background.start(self._connect())
        peer = await asyncio.shield(self._peer)  # others may wait for it as well
        return await peer.call(method, *args)

    async def close(self) -> None:
        self._is_closed = True
        if self._peer is not None:
            self._peer.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await (await self._peer).close()


def _is_over(peer: asyncio.Task[DirectPeer]) -> bool:
    return peer.done() and (peer.cancelled() or peer.exception() is not None or peer.result().is_lost)


class WatchedLine(Line):
    """One whose other end is started again when it hangs: connected, and without an answer to anything.

    Args:
        connect: as of `Line`.
        restart: ends the process there, so that the connection ends too and all who wait hear of it.
        timeout_s: how long it may be silent while somebody waits.
    """

    def __init__(
        self, connect: Callable[[], Coroutine[Any, Any, DirectPeer]], restart: Callable[[], None], timeout_s: float
    ) -> None:
        super().__init__(connect)
        self._restart, self._timeout_s = restart, timeout_s
        self._num_waiting = 0
        self._watcher: asyncio.Task[None] | None = None

    async def call(self, method: str, *args: Any) -> Any:
        """See `Line.call`."""
        self._num_waiting += 1
        if self._watcher is None or self._watcher.done():
            self._watcher = background.start(self._watch())
        try:
            return await super().call(method, *args)
        finally:
            self._num_waiting -= 1

    async def close(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
        await super().close()

    async def _watch(self) -> None:
        """While somebody waits."""
        while self._num_waiting:
            await asyncio.sleep(self._timeout_s / 2)
            peer = self._peer
            if not self._num_waiting or peer is None or not peer.done() or _is_over(peer):
                continue  # one that is just being started does not hang
            try:
                await answered(peer.result().call("status"), self._timeout_s / 2)
            except TimeoutError:
                log.warning("the other end does not answer, and is started again")
                background.call(self._restart)
            except Exception as e:
                log.info("while it was asked whether it lives: %s", e)


def router_line(app: str, config: ClusterConfig) -> Line:
    """To the application's router, which is started when there is none, and again when it hangs."""

    async def connect() -> DirectPeer:
        # in a thread: it asks Ray's head, and without one waits for it, which must not hold up what streams here
        router = await asyncio.to_thread(find_router, app, config)
        return await DirectPeer.connect(await router.address.remote(), "the router")

    def restart() -> None:
        ray.kill(find_router(app, config), no_restart=False)

    # all that it does is short; to start it again delays new requests by seconds, so it gets more time than replicas
    return WatchedLine(connect, restart, 2 * config.router.heartbeat_timeout_s)


class Link:
    """One replica, seen from one API replica.

    Args:
        info: the replica.
        client_id: of this API replica.
        timeout_s: a replica that leaves a poll without any answer for this long is taken for lost.
    """

    def __init__(self, info: ReplicaInfo, client_id: str, timeout_s: float) -> None:
        self.info, self._client_id, self._timeout_s = info, client_id, timeout_s
        self._line = Line(lambda: DirectPeer.connect(info.address, info.replica_id))
        self._queues: dict[str, asyncio.Queue[News] | None] = {}
        self._poller: asyncio.Task[None] | None = None
        self._silence: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        """Why its polls have failed, once they have."""

    @property
    def is_lost(self) -> bool:
        """Its polls have failed; a new link is needed."""
        return self._silence.done()

    async def call(self, method: str, *args: Any) -> Any:
        """See `Line.call`."""
        return await self._line.call(method, *args)

    async def work(self, method: str, *args: Any) -> Any:
        """The same for what may take long: ends as soon as the replica does not answer polls, too.

        Somebody has to have subscribed.
        """
        call = asyncio.ensure_future(self.call(method, *args))
        try:
            await asyncio.wait({call, self._silence}, return_when=asyncio.FIRST_COMPLETED)
            if not call.done():
                raise self._silence.result()
            return call.result()
        finally:
            call.cancel()

    def subscribe(self, key: str, queue: asyncio.Queue[News] | None) -> None:
        """Outcomes of this attempt, and that the replica is lost, go to `queue` from now on; None = it is only watched."""
        self._queues[key] = queue
        if self._poller is None or (self._poller.done() and not self.is_lost):
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
        acknowledged = 0  # the replica may have forgotten a client that was silent; what it tells again, nobody wants
        try:
            while self._queues:
                batch: Batch = await answered(self.call("poll", self._client_id, acknowledged), self._timeout_s)
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
            failure = failure_of(e, self.info.replica_id)
            self._silence.set_result(failure.error)
            log.warning("lost %s: %s", self.info.replica_id, failure.error)
            for queue in self._queues.values():
                if queue is not None:
                    queue.put_nowait(failure)
