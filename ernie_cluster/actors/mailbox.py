"""Where the replicas of one attempt leave their news, and when its tokens came. Knows queues, and no Ray."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable

from ernie_cluster.actors.merge import News
from ernie_cluster.actors.messages import Ended
from ernie_cluster.request import Span, TokenEvent


class Mailbox(asyncio.Queue[News]):
    """News of one attempt, timed as they arrive: a client that reads slowly does not make its replicas slow.

    The first token brings a span from the router's answer to itself.

    Args:
        next_index: output position of the first token to come.
        clock: seconds, never backwards.
    """

    def __init__(self, next_index: int, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._next_index, self._clock = next_index, clock
        self._routed_s = self._routed_wall_s = 0.0
        self._first_s: float | None = None
        self._last_s = 0.0
        self._num_tokens = 0

    def _put(self, item: News) -> None:
        if isinstance(item, TokenEvent):
            num_tokens = item.index + len(item.token_ids) - self._next_index
            if num_tokens > self._num_tokens:
                self._num_tokens, self._last_s = num_tokens, self._clock()
            if item.index == self._next_index and self._first_s is None:
                self._first_s = self._clock()
                span = Span("first_token", self._routed_wall_s, self._first_s - self._routed_s)
                item = dataclasses.replace(item, spans=(*item.spans, span))
        super()._put(item)

    def routed(self) -> None:
        """The attempt has its path; its replicas are asked now."""
        self._routed_s, self._routed_wall_s = self._clock(), time.time()

    def ended(self, key: str, accepted_s: float | None) -> Ended:
        """What is to be told of the attempt.

        Args:
            accepted_s: when the request was accepted; None where the client has waited for an earlier attempt, too.
        """
        first_s, more = self._first_s, self._num_tokens - 1
        if first_s is None:
            return Ended(key)
        return Ended(
            key,
            ttft_s=None if accepted_s is None else first_s - accepted_s,
            tpot_s=(self._last_s - first_s) / more if more > 0 else None,
            output_tokens=self._num_tokens,
            path_ttft_s=first_s - self._routed_s,
        )
