"""How many users there are at which second of a run. Pure: the second comes in as an argument."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Shape(Protocol):
    """The course of a load."""

    def users(self, at_s: float) -> int | None:
        """How many there should be at this second; None when the run is over."""
        ...


@dataclass(frozen=True, slots=True)
class Steps:
    """Up to the peak in equal steps: where does latency begin to bend?"""

    peak: int
    num_steps: int = 5
    step_s: float = 60.0

    def users(self, at_s: float) -> int | None:
        step = int(at_s // self.step_s)
        return math.ceil(self.peak * (step + 1) / self.num_steps) if step < self.num_steps else None


@dataclass(frozen=True, slots=True)
class Spikes:
    """A quiet level, and again and again all users at once: what do queues, admission and the autoscaler do?"""

    peak: int
    base_share: float = 0.2
    period_s: float = 60.0
    spike_s: float = 15.0
    """At the end of each period."""
    num_periods: int = 5

    def users(self, at_s: float) -> int | None:
        if at_s >= self.period_s * self.num_periods:
            return None
        is_spike = at_s % self.period_s >= self.period_s - self.spike_s
        return self.peak if is_spike else max(1, round(self.peak * self.base_share))


@dataclass(frozen=True, slots=True)
class Curve:
    """The course of a trace: its rate in each window, with the busiest window at the peak."""

    peak: int
    rates: Sequence[float]
    window_s: float = 5.0

    def users(self, at_s: float) -> int | None:
        window = int(at_s // self.window_s)
        if window >= len(self.rates):
            return None
        return round(self.peak * self.rates[window] / max(self.rates))
