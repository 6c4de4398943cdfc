"""An operator's view of the cluster as gauges, and what was decided as a counter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import get_args

from ernie_cluster.api.operator import ClusterView, DecisionView, Phase
from ernie_cluster.observe.metrics import Metrics

Labels = tuple[str, ...]

_GAUGES = (
    "ernie_replicas",
    "ernie_replica_gpus",
    "ernie_replica_start_time_seconds",
    "ernie_replica_silence_seconds",
    "ernie_needed_replicas",
    "ernie_held_requests",
    "ernie_budget",
    "ernie_budget_used",
)


class ClusterGauges:
    """Shows view after view. Knows which decisions are counted already."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._pools: set[Labels] = set()
        """(model, role) of all replicas that there ever were: those that are gone leave a 0."""
        self._counted_s = float("-inf")
        """Unix time of the last decision that is counted."""

    def has_news(self, view: ClusterView | None) -> bool:
        """Whether something was decided that is not counted yet."""
        return view is not None and any(decision.at_s > self._counted_s for decision in view.decisions)

    def show(self, view: ClusterView | None, decisions: Sequence[DecisionView]) -> None:
        """Bring the gauges up to date.

        Args:
            view: None where nobody could tell: then there are none.
            decisions: all that are known, counted or not.
        """
        for name, values in self._values(view).items():
            self._metrics.replace(name, values)
        self._metrics.set("ernie_open_promises", 0 if view is None else view.num_promises)
        for decision in decisions:
            if decision.at_s > self._counted_s:
                self._metrics.inc("ernie_scaling_actions_total", model=decision.model, action=decision.action)
        self._counted_s = max((self._counted_s, *(d.at_s for d in decisions)))

    def _values(self, view: ClusterView | None) -> dict[str, dict[Labels, float]]:
        """By gauge and labels."""
        if view is None:
            return {name: {} for name in _GAUGES}
        found: Counter[Labels] = Counter((r.model, r.phase, r.role) for r in view.replicas)
        self._pools |= {(model, role) for model, _, role in found}
        lives = {(r.model, r.replica, r.role): r for r in view.replicas if r.started_s}
        unit = (view.budget_unit,)
        values: tuple[dict[Labels, float], ...] = (
            {
                (model, phase, role): found[model, phase, role]
                for model, role in self._pools
                for phase in get_args(Phase)
            },
            {pool: sum(r.gpus for r in view.replicas if (r.model, r.role) == pool) for pool in self._pools},
            {key: r.started_s for key, r in lives.items()},
            {key: r.age_s for key, r in lives.items()},
            {(m.name, role): need for m in view.models for role, need in (m.needs or {}).items()},
            {(m.name,): m.num_held for m in view.models},
            {unit: view.budget},
            {unit: view.used},
        )
        return dict(zip(_GAUGES, values, strict=True))
