"""What can grow and shrink: the engine replicas of a model, and its vision replicas; how many of each there should be."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ernie_cluster.config.pool import Role
from ernie_cluster.config.scaling import ModelBounds
from ernie_cluster.policy.scaling.needs import Needs
from ernie_cluster.policy.scaling.roles import Split, fewest, is_measured, replicas_for
from ernie_cluster.policy.scaling.snapshot import ENGINE_ROLES, ModelState

GROW_AT = 1.03
"""Pressure above which replicas are added."""
SHRINK_TO = 0.85
"""Pressure that must not be passed after replicas were given up, at the lately highest demand; far enough below `GROW_AT`
that what was given up is not asked for again."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Replicas of one model that stand in for each other."""

    model: str
    is_vision: bool
    have: int
    """Those that count: also starting, switching, planned."""
    want: int
    """Fewer are too few."""
    keep: int
    """More are not needed, not even for the lately highest demand; at least `least`."""
    least: int
    """That nobody may take away."""
    pressure: float
    """Need over what there is; infinite where requests wait and cannot be served."""
    need: float
    """Replicas, as a real number."""
    gpus: float
    """Of the next one."""
    silent: int = 0
    """Of `have`, those of whom nobody knows whether they still serve: others are not given up because of them."""

    @property
    def sure(self) -> int:
        return self.have - self.silent

    @property
    def missing(self) -> int:
        return max(0, self.want - self.have)

    @property
    def name(self) -> str:
        return f"{self.model} {'vision' if self.is_vision else 'engines'}"


def is_asleep(state: ModelState, bounds: ModelBounds) -> bool:
    """Nothing is there, nothing has to be, and nobody asks."""
    must = bounds.floor or any(p.min_replicas for p in bounds.pools)
    asked = state.num_held or state.prefill.requests_per_s
    return not (must or asked or any(r.counts for r in state.replicas))


def units_of(state: ModelState, bounds: ModelBounds, now: Needs, peak: Needs) -> list[Unit]:
    """The units of a model that is not asleep, engines first."""
    units = [_engines(state, bounds, now, peak)]
    pool = bounds.pool("vision")
    if pool is not None:
        have = state.count("vision")
        need, high = now.vision, peak.vision
        want = have if need is None else math.ceil(need / GROW_AT - 1e-9)
        keep = have if high is None else math.ceil(max(high, need or 0) / SHRINK_TO - 1e-9)
        is_seeing = bool(state.vision.requests_per_s or state.vision.backlog_tokens)
        least = max(pool.min_replicas, min(1, pool.max_replicas) if bounds.floor or is_seeing else 0)
        want, keep = (min(max(n, least), pool.max_replicas) for n in (want, keep))
        pressure = math.inf if is_seeing and not have else (need or 0.0) / max(have, 1)
        keep, silent = max(keep, want), state.silent("vision")
        units.append(Unit(state.name, True, have, want, keep, least, pressure, need or 0.0, pool.gpus, silent))
    return units


def _engines(state: ModelState, bounds: ModelBounds, now: Needs, peak: Needs) -> Unit:
    split = Split.of(state)
    least = fewest(bounds)
    most = sum(p.max_replicas for role in ENGINE_ROLES if (p := bounds.pool(role)))
    role = next_role(split, bounds, now)
    pool = bounds.pool(role)
    assert pool is not None
    if is_measured(now) and is_measured(peak):
        want, keep = replicas_for(now, bounds, GROW_AT), replicas_for(peak, bounds, SHRINK_TO)
        need, pressure = (now.prefill or 0.0) + (now.decode or 0.0), split.pressure(now)
    else:
        want = keep = max(split.total, least)
        need, pressure = float(split.total), 1.0 if split.serves else math.inf
    want, keep = (min(max(n, least), most) for n in (want, keep))
    keep, silent = max(keep, want), state.silent(*ENGINE_ROLES)
    return Unit(state.name, False, split.total, want, keep, least, pressure, need, pool.gpus, silent)


def next_role(split: Split, bounds: ModelBounds, needs: Needs) -> Role:
    """Of the next engine replica: the one that would help most."""
    counts = split.counts()
    able = [r for r in ENGINE_ROLES if (p := bounds.pool(r)) and counts[r] < p.max_replicas]
    for role in able:
        pool = bounds.pool(role)
        if pool and counts[role] < pool.min_replicas:
            return role
    if not split.total and "mixed" in able:
        return "mixed"
    wanted = {"prefill": needs.prefill or 1.0, "decode": needs.decode or 1.0}
    special = [r for r in able if r != "mixed"]
    if special:
        return max(special, key=lambda r: (wanted[r] / counts[r] if counts[r] else math.inf, r == "prefill"))
    return able[0] if able else next(r for r in ENGINE_ROLES if bounds.pool(r))
