"""Five equal steps up to `--users`, each of `--step-time`. Add it to a locustfile: `-f loadtests/over_http.py,loadtests/shapes/steps.py`"""

from __future__ import annotations

from typing import Any

from ernie_cluster.bench import shapes
from loadtests.shapes.base import Planned, peak


class Steps(Planned):
    """Where does latency begin to bend?"""

    def plan(self, options: Any) -> shapes.Shape:
        return shapes.Steps(peak(options), step_s=options.step_time)
