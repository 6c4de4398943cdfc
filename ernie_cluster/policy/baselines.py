"""What a request may choose from: all replicas by their costs, or, to compare with, one of each pool that is picked blindly."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection
from typing import Protocol

from ernie_cluster.config.pool import Role
from ernie_cluster.config.router import RouterConfig
from ernie_cluster.policy.fleet import Fleet
from ernie_cluster.policy.snapshot import ReplicaSnapshot


class Baseline(Protocol):
    """A way of routing that costs have no part in."""

    def pick(self, usable: list[ReplicaSnapshot], role: Role) -> ReplicaSnapshot:
        """One of these, of which there is at least one."""
        ...


class RoundRobin:
    """Each in its turn."""

    def __init__(self) -> None:
        self._turns = Counter[tuple[str, Role]]()

    def pick(self, usable: list[ReplicaSnapshot], role: Role) -> ReplicaSnapshot:
        ordered = sorted(usable, key=lambda r: r.replica_id)
        turn = self._turns[usable[0].model, role]
        self._turns[usable[0].model, role] += 1
        return ordered[turn % len(ordered)]


class TwoChoices:
    """Of two by chance the one with fewer requests, as Ray Serve does (Mitzenmacher 2001)."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    def pick(self, usable: list[ReplicaSnapshot], role: Role) -> ReplicaSnapshot:
        two = self._chance.sample(usable, min(2, len(usable)))
        return min(two, key=lambda r: r.num_running + r.num_waiting)


def baseline_of(limits: RouterConfig, chance: random.Random) -> Baseline | None:
    """What `router.policy` names; None where costs decide."""
    if limits.policy == "cost":
        return None
    return RoundRobin() if limits.policy == "round_robin" else TwoChoices(chance)


def narrowed(baseline: Baseline, fleet: Fleet, model: str, exclude: Collection[str]) -> frozenset[str]:
    """The replicas not to be used: those of `exclude`, and of each pool all but one."""
    out = set(exclude)
    for role in sorted(fleet.roles(model)):
        usable = [r for r in fleet.pool(model, role).usable if r.replica_id not in out]
        if usable:
            chosen = baseline.pick(usable, role)
            out |= {r.replica_id for r in usable if r is not chosen}
    return frozenset(out)
