"""When an answer must be finished, all its rounds together."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


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
