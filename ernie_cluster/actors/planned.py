"""Serve's custom scaling policy: each pool has as many replicas as the application's one plan says.

Serve's controller calls it ten times a second for each pool, and it must not wait: a thread beside it keeps the plan fresh.
While the router is away, everything stays as it is. Serve pickles this module by value, so it holds nothing else.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ernie_cluster.actors.plan_reader import reader_of
from ernie_cluster.policy.scaling.plan import PoolKey

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

PLANNED_REPLICAS = f"{__name__}:PlannedReplicas"
"""As Serve's configuration names a policy."""


class PlannedReplicas:
    """The policy of one pool.

    Args:
        router: name of the application's router.
        life: of the application; another one after it was deployed anew.
        model: served name.
        role: of the pool.
    """

    def __init__(self, router: str, life: str, model: str, role: Any) -> None:
        self._pool: PoolKey = (model, role)
        self._router, self._life = router, life
        self._seen: set[str] = set()
        """Gangs of the pool that run or did."""

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        model, role = self._pool
        running = tuple(f"{model}/{role}/{r.unique_id}" for r in context.running_replicas)
        reader = reader_of(self._router, self._life)
        reader.put(self._pool, context.target_num_replicas, running)
        plan = reader.get(time.monotonic())
        self._seen.update(running)
        if plan is None:
            return context.target_num_replicas, {}
        self._seen &= plan.stopping.union(running)
        return plan.wanted(self._pool, running, self._seen.difference(running)), {}
