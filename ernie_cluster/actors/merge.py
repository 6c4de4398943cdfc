"""What several replicas tell of one attempt, put into the order of the answer. Knows queues, and no Ray."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ernie_cluster.actors.messages import EncodeReport
from ernie_cluster.errors import DeadlineExceeded, EngineFailed, ReplicaLost
from ernie_cluster.request import Span, TokenEvent


@dataclass(frozen=True, slots=True)
class Failure:
    """One replica's part of an attempt has failed."""

    replica_id: str
    error: Exception
    is_told: bool
    """The replica itself said so; otherwise it does not answer any more."""

    def culprit(self, route: Sequence[str]) -> str | None:
        """The replica that had better not be met again, if one is to blame.

        Args:
            route: ids of the replicas in the order of the work; each knows the next one only.
        """
        if not self.is_told or isinstance(self.error, EngineFailed):
            return self.replica_id
        if isinstance(self.error, ReplicaLost):  # it could not reach the next one
            return dict(pairwise(route)).get(self.replica_id)
        return None


class AttemptFailed(Exception):
    """Carries a `Failure` from `merge` to whoever decides what to do about it."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.failure = failure


News = TokenEvent | EncodeReport | Failure


async def merge(
    queue: asyncio.Queue[News], next_index: int, spans: list[Span], timeout_s: float
) -> AsyncGenerator[list[TokenEvent], None]:
    """Events of all replicas by ascending index, each once; ends with the one that bears a finish reason.

    Args:
        queue: what the replicas tell, in any order between replicas.
        next_index: output position of the first token to come.
        spans: the journey so far; grows, and goes out with the last event.
        timeout_s: for the whole answer.

    Raises:
        AttemptFailed: a replica failed; raised once what came before it is out.
        DeadlineExceeded: no end within `timeout_s`.
    """
    early: dict[int, TokenEvent] = {}
    num_cached = 0
    deadline = time.monotonic() + timeout_s
    while True:
        failure: Failure | None = None
        for item in await _take(queue, deadline, timeout_s):
            if isinstance(item, Failure):
                failure = failure or item
                continue
            spans.extend(item.spans)
            if isinstance(item, TokenEvent):
                early[item.index] = item
                num_cached = max(num_cached, item.num_cached_tokens)
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
        if failure is not None:
            raise AttemptFailed(failure)


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
