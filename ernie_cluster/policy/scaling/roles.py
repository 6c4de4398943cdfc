"""How the engine replicas of one model share prefill and decode, and when some change sides.

The worst stage decides: a split is as good as the larger of need / replicas over its stages, its pressure. Mixed replicas
go where they are missed, but are worth less than specialists, as prompts hold up the answers beside them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ernie_cluster.config.pool import Role
from ernie_cluster.config.scaling import ModelBounds, ScalingPace
from ernie_cluster.policy.scaling.actions import SwitchRole
from ernie_cluster.policy.scaling.memory import ModelMemory
from ernie_cluster.policy.scaling.needs import NOISE, Needs, noise_of
from ernie_cluster.policy.scaling.snapshot import ENGINE_ROLES, ModelState, ReplicaState

MIXED_WORTH = 0.8
_EASY = 0.9
"""Pressure at which nothing has to change."""
_MAX_BAND = 0.5


@dataclass(frozen=True, slots=True)
class Split:
    """Engine replicas of a model by role."""

    prefill: int
    decode: int
    mixed: int

    @staticmethod
    def of(state: ModelState) -> Split:
        return Split(state.count("prefill"), state.count("decode"), state.count("mixed"))

    @property
    def total(self) -> int:
        return self.prefill + self.decode + self.mixed

    @property
    def serves(self) -> bool:
        """Whether a request can come through."""
        return bool(self.mixed or (self.prefill and self.decode))

    def counts(self) -> Mapping[Role, int]:
        return {"prefill": self.prefill, "decode": self.decode, "mixed": self.mixed}

    def pressure(self, needs: Needs) -> float:
        """Need over replicas of the worst stage, 1 = just enough; infinite where it does not serve.

        2 + 2 replicas for needs of 3 and 1 have 1.5; with one mixed beside them 3 / 2.8 = 1.07.
        """
        assert needs.prefill is not None
        assert needs.decode is not None
        if not self.serves:
            return math.inf
        shared = MIXED_WORTH * self.mixed
        prefill, decode = self.prefill + shared, self.decode + shared
        together = (needs.prefill + needs.decode) / (self.prefill + self.decode + shared)
        return max(needs.prefill / prefill, needs.decode / decode, together)


def is_measured(needs: Needs) -> bool:
    """Whether both engine stages are known."""
    return needs.prefill is not None and needs.decode is not None


def best_split(total: int, needs: Needs, bounds: ModelBounds) -> Split | None:
    """The split of `total` replicas with the least pressure within the bounds of each role; None where there is none."""
    found = [s for s in _splits(total, needs, bounds) if s.serves and _is_within(s, bounds)]
    return min(found, key=lambda s: (s.pressure(needs), s.mixed, s.prefill), default=None)


def replicas_for(needs: Needs, bounds: ModelBounds, pressure: float) -> int:
    """Fewest engine replicas whose best split has at most this pressure; what a role may not have is not asked for."""
    assert needs.prefill is not None
    assert needs.decode is not None
    most = sum(p.max_replicas for role in ENGINE_ROLES if (p := bounds.pool(role)))
    prefill, decode = bounds.pool("prefill"), bounds.pool("decode")
    worth = MIXED_WORTH
    if prefill and decode:
        capped = (
            min(needs.prefill, pressure * prefill.max_replicas),
            min(needs.decode, pressure * decode.max_replicas),
        )
        needs, worth = Needs(*capped, needs.vision), 1.0
    assert needs.prefill is not None
    assert needs.decode is not None
    total = max(fewest(bounds), math.ceil((needs.prefill + needs.decode) / (pressure * worth) - 1e-9))
    while total < most:
        split = best_split(total, needs, bounds)
        if split is not None and split.pressure(needs) <= pressure + 1e-9:
            return total
        total += 1
    return most


def fewest(bounds: ModelBounds) -> int:
    """Engine replicas below which the model cannot serve, or that its bounds ask for."""
    minima = sum(p.min_replicas for role in ENGINE_ROLES if (p := bounds.pool(role)))
    return max(minima, bounds.floor, 1 if bounds.pool("mixed") else 2)


def switch_roles(
    state: ModelState, memory: ModelMemory, needs: Needs, bounds: ModelBounds, pace: ScalingPace, now_s: float
) -> SwitchRole | None:
    """The switch that helps most, or None: nothing is short, or the gain is within noise, or it would take one back."""
    if not (bounds.may_switch and is_measured(needs)):
        return None
    now, best = Split.of(state), best_split(Split.of(state).total, needs, bounds)
    if best is None or best == now:
        return None
    before, after = now.pressure(needs), best.pressure(needs)
    band = min(_MAX_BAND, max(pace.margin, NOISE * noise_of(memory.prefill)))
    if before <= max(_EASY, after * (1 + band)):
        return None
    surplus = {role: now.counts()[role] - best.counts()[role] for role in ENGINE_ROLES}
    source, target = max(ENGINE_ROLES, key=surplus.__getitem__), min(ENGINE_ROLES, key=surplus.__getitem__)
    is_back = target == memory.switched_from and now_s - memory.switched_s < pace.settle_s
    if is_back and math.isfinite(before):
        return None
    count = min(surplus[source], -surplus[target], max(1, int(pace.max_share * now.counts()[source])))
    chosen = idlest(state, source)[:count]
    if not chosen:
        return None
    reason = (
        f"need {needs.prefill:.2f} prefill + {needs.decode:.2f} decode, have {_said(now)}: pressure {before:.2f}, "
        f"{after:.2f} with {_said(best)} (beyond the band of {band:.0%})"
    )
    return SwitchRole(state.name, tuple(r.replica_id for r in chosen), source, target, reason)


def switched(state: ModelState, action: SwitchRole) -> ModelState:
    """The model as the rest of the decision is to see it: who switches is told nothing else."""
    ids = set(action.replica_ids)
    there = (replace(r, role=action.target, phase="switching") if r.replica_id in ids else r for r in state.replicas)
    return replace(state, replicas=tuple(there))


def idlest(state: ModelState, role: Role) -> list[ReplicaState]:
    """Replicas of a role that may be told something else, those first that have least to finish."""
    order = {"planned": 0, "starting": 1, "ready": 2}
    free = [r for r in state.replicas if r.role == role and r.phase in order]
    return sorted(free, key=lambda r: (order[r.phase], r.load, r.replica_id))


def _splits(total: int, needs: Needs, bounds: ModelBounds) -> Iterator[Split]:
    mixed = bounds.pool("mixed")
    if not (bounds.pool("prefill") and bounds.pool("decode")):
        yield Split(0, 0, total)
        return
    least_mixed = mixed.min_replicas if mixed else 0
    for num_mixed in {least_mixed, least_mixed + 1, total} if mixed else {0}:
        rest = total - num_mixed
        if rest < 0 or num_mixed > (mixed.max_replicas if mixed else 0):
            continue
        low, high = _prefill_range(rest, bounds)
        both = (needs.prefill or 0.0) + (needs.decode or 0.0)
        share = (needs.prefill or 0.0) / both if both else 0.5
        around = math.floor(rest * share)
        for p in {min(max(p, low), high) for p in (around - 1, around, around + 1, around + 2)}:
            if 0 <= p <= rest:
                yield Split(p, rest - p, num_mixed)


def _prefill_range(rest: int, bounds: ModelBounds) -> tuple[int, int]:
    prefill, decode = bounds.pool("prefill"), bounds.pool("decode")
    assert prefill is not None
    assert decode is not None
    return (
        max(prefill.min_replicas, rest - decode.max_replicas),
        min(prefill.max_replicas, rest - decode.min_replicas),
    )


def _is_within(split: Split, bounds: ModelBounds) -> bool:
    for role, count in split.counts().items():
        pool = bounds.pool(role)
        if not (pool.min_replicas <= count <= pool.max_replicas if pool else count == 0):
            return False
    return True


def _said(split: Split) -> str:
    return " + ".join(f"{n} {role}" for role, n in split.counts().items() if n) or "none"
