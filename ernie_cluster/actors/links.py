"""The API's side of an engine's outcomes: one poll always under way per engine, fanned out to the requests."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

from ernie_cluster.actors.messages import NAMESPACE, Batch, Outcome, ReplicaInfo
from ernie_cluster.errors import EngineFailed, ErnieClusterError, ReplicaLost
from ernie_cluster.request import RequestFailed

log = logging.getLogger(__name__)

_POLL_TIMEOUT_S = 10.0
"""An engine that leaves a poll without any answer for this long is taken for lost."""


def translate(error: BaseException, where: str) -> Exception:
    """An exception of Ray's, as one of our tree."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        return (
            cause if isinstance(cause, ErnieClusterError) else EngineFailed(f"{where}: {type(cause).__name__}: {cause}")
        )
    if isinstance(error, ErnieClusterError):
        return error
    if isinstance(error, RayActorError):
        return ReplicaLost(f"{where} is gone")
    if isinstance(error, TimeoutError):
        return ReplicaLost(f"{where} does not answer")
    return EngineFailed(f"{where}: {type(error).__name__}: {error}")


class Link:
    """One engine, seen from one API replica.

    Args:
        info: the replica.
        client_id: of this API replica.
    """

    def __init__(self, info: ReplicaInfo, client_id: str) -> None:
        self.info, self._client_id = info, client_id
        try:
            self.actor: Any = ray.get_actor(info.actor_name, NAMESPACE)
        except ValueError:
            raise ReplicaLost(f"{info.replica_id} is gone") from None
        self._queues: dict[str, asyncio.Queue[Outcome]] = {}
        self._poller: asyncio.Task[None] | None = None
        self.is_lost = False

    def subscribe(self, request_id: str, queue: asyncio.Queue[Outcome]) -> None:
        """Outcomes of this request go to `queue` from now on."""
        self._queues[request_id] = queue
        if self._poller is None and info_has_events(self.info):
            self._poller = asyncio.ensure_future(self._poll())

    def unsubscribe(self, request_id: str) -> None:
        self._queues.pop(request_id, None)

    async def close(self) -> None:
        if self._poller is not None:
            self._poller.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._poller

    async def _poll(self) -> None:
        acknowledged = 0
        try:
            while True:
                batch: Batch = await asyncio.wait_for(
                    self.actor.poll.remote(self._client_id, acknowledged), _POLL_TIMEOUT_S
                )
                acknowledged = batch.number
                for outcome in batch.outcomes:
                    queue = self._queues.get(outcome.request_id)
                    if queue is not None:
                        queue.put_nowait(outcome)
        except asyncio.CancelledError:
            raise
        except (Exception, ActorUnavailableError) as e:
            self.is_lost = True
            error = translate(e, self.info.replica_id)
            log.warning("lost %s: %s", self.info.replica_id, error)
            for request_id, queue in self._queues.items():
                queue.put_nowait(RequestFailed(request_id, error))


def info_has_events(info: ReplicaInfo) -> bool:
    """Vision replicas answer the call itself."""
    return info.role != "vision"
