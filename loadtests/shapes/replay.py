"""As many users as `--trace` has requests, the busiest five seconds at `--users`. Without `--trace`: azure-chat's course."""

from __future__ import annotations

from typing import Any

from ernie_cluster.bench import shapes, traces
from loadtests.shapes.base import Planned, peak

WINDOW_S = 5.0


class Replay(Planned):
    """What does a real day look like? For exact arrivals see `ernie-cluster bench --trace`."""

    def plan(self, options: Any) -> shapes.Shape:
        arrivals = traces.read(options.trace or traces.PACKAGED[0])
        return shapes.Curve(peak(options), traces.rates(arrivals, WINDOW_S), WINDOW_S)
