"""From a course of `ernie_cluster/bench/shapes.py` to a shape of Locust. `--users` is the peak, `--run-time` ends it sooner."""

from __future__ import annotations

from typing import Any

from locust import LoadTestShape

from ernie_cluster.bench.shapes import Shape


class Planned(LoadTestShape):
    """A shape that follows a plan."""

    abstract = True
    use_common_options = True
    _plan: Shape | None = None

    def plan(self, options: Any) -> Shape:
        """Made once, from the command line or the web UI's form."""
        raise NotImplementedError

    def reset_time(self) -> None:
        super().reset_time()
        self._plan = None

    def tick(self) -> tuple[int, float] | None:
        assert self.runner is not None
        options = self.runner.environment.parsed_options
        if self._plan is None:
            self._plan = self.plan(options)
        at_s = self.get_run_time()
        users = self._plan.users(at_s)
        run_time_s = options.run_time
        is_over = users is None or (run_time_s is not None and at_s >= float(run_time_s))
        return (
            None if is_over or users is None else (users, max(1.0, float(options.spawn_rate or options.num_users or 1)))
        )


def peak(options: Any) -> int:
    """`--users`."""
    return int(options.num_users or 10)
