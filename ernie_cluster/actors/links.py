"""The API's side of an engine's outcomes: one poll always under way per engine, fanned out to the attempts."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from ernie_cluster.actors import background
from ernie_cluster.actors.merge import Failure, News
from ernie_cluster.actors.messages import NAMESPACE, Batch, ReplicaInfo
from ernie_cluster.errors import EngineFailed, ErnieClusterError, ReplicaLost
from ernie_cluster.request import RequestFailed

log = logging.getLogger(__name__)

_POLL_TIMEOUT_S = 10.0
"""An engine that leaves a poll without any answer for this long is taken for lost."""
_HEAD_START = 3
"""Turns of the event loop that outcomes get, so that tokens are on their way to clients before the next poll, which
costs half a millisecond, is made: queue to attempt, attempt to answer, answer to wire."""


def translate(error: BaseException, where: str) -> Exception:
    """An exception that came out of a Ray call, as one of our tree.

    Args:
        where: who was called, for the message.
    """
    if isinstance(error, RayTaskError):
        cause = error.cause
        if isinstance(cause, ErnieClusterError):
            return cause
        return EngineFailed(f"{where}: {type(cause).__name__}: {cause}")
    if isinstance(error, ErnieClusterError):
        return error
    if isinstance(error, RayActorError):
        return ReplicaLost(f"{where} is gone")
    if isinstance(error, TimeoutError):
        return ReplicaLost(f"{where} does not answer")
    return EngineFailed(f"{where}: {type(error).__name__}: {error}")


def failure_of(error: BaseException, replica_id: str) -> Failure:
    """What a failed call of a replica means for the attempt."""
    return Failure(replica_id, translate(error, replica_id), is_told=isinstance(error, RayTaskError))


class Link:
    """One replica, seen from one API replica.

    Args:
        info: the replica.
        client_id: of this API replica.

    Raises:
        ReplicaLost: it is gone already.
    """

    def __init__(self, info: ReplicaInfo, client_id: str) -> None:
        self.info, self._client_id = info, client_id
        try:
            self.actor: Any = ray.get_actor(info.actor_name, NAMESPACE)
        except ValueError:
            raise ReplicaLost(f"{info.replica_id} is gone") from None
        self._queues: dict[str, asyncio.Queue[News]] = {}
        self._poller: asyncio.Task[None] | None = None
        self.is_lost = False
        """Its polls have failed; a new link is needed."""

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

    async def _poll(self) -> None:
        acknowledged = 0
        try:
            while True:
                poll = self.actor.poll.remote(self._client_id, acknowledged)
                batch: Batch = await asyncio.wait_for(poll, _POLL_TIMEOUT_S)
                acknowledged = batch.number
                for outcome in batch.outcomes:
                    queue = self._queues.get(outcome.request_id)
                    if queue is None:
                        continue  # its client has left
                    if isinstance(outcome, RequestFailed):
                        queue.put_nowait(Failure(self.info.replica_id, outcome.error, is_told=True))
                    else:
                        queue.put_nowait(outcome)
                for _ in range(_HEAD_START):
                    await asyncio.sleep(0)
        except Exception as e:
            self.is_lost = True
            failure = failure_of(e, self.info.replica_id)
            log.warning("lost %s: %s", self.info.replica_id, failure.error)
            for queue in self._queues.values():
                queue.put_nowait(failure)
