"""A fifth of `--users`, and all of them in the last quarter of each `--step-time`, five times."""

from __future__ import annotations

from typing import Any

from ernie_cluster.bench import shapes
from loadtests.shapes.base import Planned, peak


class Spikes(Planned):
    """What do queues, admission and the autoscaler do?"""

    def plan(self, options: Any) -> shapes.Shape:
        return shapes.Spikes(peak(options), period_s=options.step_time, spike_s=options.step_time / 4)
