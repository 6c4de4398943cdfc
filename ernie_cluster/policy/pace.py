"""How often the router asks each replica what is new: as often as configured while they are few, less often when many."""

from __future__ import annotations

from ernie_cluster.config.router import RouterConfig

_REPLICA_S = 0.00075
"""Between two answers, whoever gives them: one takes up to 0.23 ms of the router's CPU time (BENCHMARKS.md), so that it keeps
two thirds of a core for requests. 133 replicas may each be asked ten times a second, 1,000 four times in three seconds."""


def pause_s(num_replicas: int, limits: RouterConfig) -> float:
    """Between an answer of one of so many replicas and the next question to it.

    Never so long that a replica could seem dead: within half the heartbeat timeout it is asked again.
    """
    return max(limits.snapshot_interval_s, min(num_replicas * _REPLICA_S, limits.heartbeat_timeout_s / 2))
