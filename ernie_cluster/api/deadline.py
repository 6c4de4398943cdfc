"""When an answer must be finished, all its rounds together."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from ernie_cluster.errors import InvalidRequest

TIMEOUT_HEADER = "x-request-timeout"
"""Seconds that an answer over HTTP may take; a gRPC call has its own deadline."""


def timeout_of(given: str | None, most_s: float) -> float:
    """What a request may take.

    Args:
        given: its `TIMEOUT_HEADER`, None without one.
        most_s: what none may exceed, and those get that say nothing.

    Raises:
        InvalidRequest: no number of seconds above 0.
    """
    if given is None:
        return most_s
    try:
        asked_s = float(given)
    except ValueError:
        asked_s = math.nan
    if not asked_s > 0:
        raise InvalidRequest(f"{TIMEOUT_HEADER} is {given[:40]!r}; give seconds, more than 0", TIMEOUT_HEADER)
    return min(asked_s, most_s)


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment, and the clock that it is told by."""

    at_s: float
    """By `clock`."""
    clock: Callable[[], float] = time.monotonic

    @property
    def left_s(self) -> float:
        """Seconds until then; at least 1 ms, for a request's time is never 0. Who is late is stopped by other hands."""
        return max(0.001, self.at_s - self.clock())
