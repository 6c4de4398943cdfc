"""What several replicas tell of one attempt, put into the order of the answer. Knows queues, and no Ray.

A replica that fails when its part is over takes nothing with it: whoever decodes needs neither the pictures nor the prompt.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass

from ernie_cluster.actors.messages import EncodeReport
from ernie_cluster.errors import DeadlineExceeded, EngineFailed, PeerSilent, ReplicaDraining, ReplicaLost
from ernie_cluster.request import Span, TokenEvent

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Failure:
    """One replica's part of an attempt has failed."""

    replica_id: str
    error: Exception
    is_told: bool
    """The replica itself said so; otherwise it does not answer any more."""

    def culprit(self, links: Mapping[str, str]) -> str | None:
        """The replica that had better not be met again, if one is to blame.

        Args:
            links: by id, the replica that each sends its work to, and which is all that it knows of the others.
        """
        if not self.is_told or isinstance(self.error, (EngineFailed, ReplicaDraining)):
            return self.replica_id
        if isinstance(self.error, (ReplicaLost, PeerSilent)):  # it could not reach the next one
            return links.get(self.replica_id)
        return None


@dataclass(frozen=True, slots=True)
class Cast:
    """Who plays which part in an attempt; all others encode."""

    prefill: str
    decode: str | None
    """None where `prefill` answers, too."""

    def is_over(self, replica_id: str, num_given: int, num_heard: int) -> bool:
        """Whether the part of a replica is over, so that its end changes nothing.

        Pictures are where they are needed once there is a token. The prompt's KV is handed over, and its only token with
        it, once somebody has told of a second one, which nobody but the decode replica makes.

        Args:
            num_given: tokens of this attempt that are there without a gap before them.
            num_heard: tokens up to the last one that anybody has told of; at least `num_given`.
        """
        if replica_id == self.decode or (replica_id == self.prefill and self.decode is None):
            return False
        if replica_id == self.prefill:
            return num_given >= 1 and num_heard >= 2
        return num_given >= 1


class AttemptFailed(Exception):
    """Carries a `Failure` from `merge` to whoever decides what to do about it."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.failure = failure


News = TokenEvent | EncodeReport | Failure


async def merge(
    queue: asyncio.Queue[News], next_index: int, spans: list[Span], timeout_s: float, cast: Cast
) -> AsyncGenerator[list[TokenEvent], None]:
    """Events of all replicas by ascending index, each once; ends with the one that bears a finish reason.

    Args:
        queue: what the replicas tell, in any order between replicas.
        next_index: output position of the first token to come.
        spans: the journey so far; grows, and goes out with the last event.
        timeout_s: for the whole answer.
        cast: who does what.

    Raises:
        AttemptFailed: a replica failed whose part is not over; raised once what came before it is out.
        DeadlineExceeded: no end within `timeout_s`.
    """
    early: dict[int, TokenEvent] = {}
    num_cached = 0
    first_index = end_index = next_index
    deadline = time.monotonic() + timeout_s
    while True:
        failures: list[Failure] = []
        for item in await _take(queue, deadline, timeout_s):
            if isinstance(item, Failure):
                failures.append(item)
                continue
            spans.extend(item.spans)
            if isinstance(item, TokenEvent):
                early[item.index] = item
                num_cached = max(num_cached, item.num_cached_tokens)
                end_index = max(end_index, item.index + len(item.token_ids))
        ready: list[TokenEvent] = []
        while next_index in early:
            event = early.pop(next_index)
            next_index += len(event.token_ids)
            is_last = event.finish_reason is not None
            journey = tuple(sorted(spans, key=lambda s: s.start_s)) if is_last else ()
            ready.append(dataclasses.replace(event, spans=journey, num_cached_tokens=num_cached))
            if is_last:
                break
        if ready:
            yield ready
            if ready[-1].finish_reason is not None:
                return
        for failure in failures:
            if not cast.is_over(failure.replica_id, next_index - first_index, end_index - first_index):
                raise AttemptFailed(failure)
            log.info("%s has failed after its part was over: %s", failure.replica_id, failure.error)


async def _take(queue: asyncio.Queue[News], deadline: float, timeout_s: float) -> list[News]:
    """All that is there, at least one."""
    try:
        # not `wait_for`: Python 3.11's forgets that it was cancelled when the item comes in the same moment, and the
        # answer to a client who has left would be computed to its end
        async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
            items = [await queue.get()]
    except TimeoutError:
        raise DeadlineExceeded(f"no answer within {timeout_s:g} s") from None
    while not queue.empty():
        items.append(queue.get_nowait())
    return items
