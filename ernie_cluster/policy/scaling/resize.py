"""Who gets and who gives replicas: GPU moves between models, then free GPUs, then what nobody needs is stopped.

The neediest unit is served first. A move takes what its owner does not need; where nobody has any to spare, what its owner
needs clearly less, so that everybody's shortage comes out alike and no model starves.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace

from ernie_cluster.config.pool import Role
from ernie_cluster.config.scaling import ROUNDING, ModelBounds, ScalingConfig
from ernie_cluster.policy.scaling.actions import Action, MoveGpus, ScaleIn, ScaleOut, Stop, WakeUp
from ernie_cluster.policy.scaling.needs import Needs
from ernie_cluster.policy.scaling.roles import Split, best_split, idlest, is_measured
from ernie_cluster.policy.scaling.snapshot import ENGINE_ROLES, ModelState, ReplicaState, ScalingSnapshot
from ernie_cluster.policy.scaling.units import Unit, next_role

_FAIR = 1.25
"""How much higher the pressure of who gets must be, after the move, than that of who gives without having to spare."""


def free_gpus(snapshot: ScalingSnapshot, total: float) -> float:
    """GPUs that may be given out: what is held, and what is promised, both leave them free."""
    replicas = [r for m in snapshot.models for r in m.replicas]
    held = math.fsum(r.gpus for r in replicas if r.holds_gpus)
    promised = math.fsum(r.gpus for r in replicas if r.counts)
    return total - max(held, promised)


@dataclass(slots=True)
class Ledger:
    """One decision while it is made: what has been given out already."""

    config: ScalingConfig
    now_s: float
    states: dict[str, ModelState]
    needs: dict[str, Needs]
    units: dict[str, Unit]
    """By name."""
    settled: dict[str, bool]
    """Whether a model's GPUs have not been moved lately."""
    free: float
    actions: list[Action] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    moved: set[str] = field(default_factory=set)
    """Models that took part in a move."""

    def grow(self) -> None:
        """Serve every unit that is short, neediest first."""
        short = sorted((u for u in self.units.values() if u.missing), key=lambda u: (-u.pressure, u.name))
        for unit in short:
            if not self.units[unit.name].missing:  # it was woken with its model
                continue
            if not unit.have and not unit.is_vision and self._wake(unit):
                continue
            missing = self._move(unit, unit.missing, is_fair=False)
            missing = self._start(unit, missing)
            if missing and not self._has_free(unit.gpus):
                missing = self._move(unit, min(missing, 1), is_fair=True)
            if missing:
                self.notes.append(
                    f"{unit.name}: short of {unit.need:.2f} with {unit.have}, but {self.free:g} of "
                    f"{self.config.total_gpus:g} GPUs are free and nobody has clearly more"
                )

    def shrink(self, unit: Unit, low_for_s: float) -> None:
        """Stop what has not been needed for long."""
        count = min(unit.sure - unit.keep, self._most(unit.have))
        reason = f"{unit.keep} of {unit.have} are enough for the last peak and have been for {low_for_s:.0f} s"
        by_role: dict[Role, list[str]] = {}
        for stop in self._spare(unit, count):
            by_role.setdefault(stop.role, []).append(stop.replica_id)
        self.actions += [ScaleIn(unit.model, role, tuple(ids), reason) for role, ids in by_role.items()]

    def _has_free(self, gpus: float) -> bool:
        return gpus <= self.free + ROUNDING

    def _most(self, count: int) -> int:
        return max(1, int(self.config.pace.max_share * count))

    def _wake(self, unit: Unit) -> bool:
        bounds = self._bounds(unit.model)
        roles: tuple[Role, ...] = ("mixed",) if bounds.pool("mixed") else ("prefill", "decode")
        if bounds.pool("vision") and not self.states[unit.model].count("vision"):
            roles = (*roles, "vision")
        gpus = sum(pool.gpus for role in roles if (pool := bounds.pool(role)))
        if not self._has_free(gpus):
            return False
        held = self.states[unit.model].num_held
        reason = f"no replica is there, {held} requests wait; {gpus:g} of {self.free:g} free GPUs"
        self.actions.append(WakeUp(unit.model, roles, reason))
        self.free -= gpus
        if "vision" in roles:
            name = f"{unit.model} vision"
            self.units[name] = replace(self.units[name], have=1)
        return True

    def _start(self, unit: Unit, missing: int) -> int:
        """Start what fits into the free GPUs; what is missing still."""
        fits = missing if not unit.gpus else int(self.free / unit.gpus + ROUNDING)
        count = max(0, min(missing, fits))
        if count:
            reason = (
                f"need {unit.need:.2f}, have {unit.have}: pressure {unit.pressure:.2f}; {self.free:g} GPUs are free"
            )
            roles = Counter(self._begin(unit) for _ in range(count))
            self.actions += [ScaleOut(unit.model, role, n, reason) for role, n in roles.items()]
            self.free -= count * unit.gpus
        return missing - count

    def _begin(self, unit: Unit) -> Role:
        """Role of one more replica, which counts from now on."""
        state = self.states[unit.model]
        role: Role = "vision"
        if not unit.is_vision:
            role = next_role(Split.of(state), self._bounds(unit.model), self.needs[unit.model])
        begun = ReplicaState(f"begun-{len(state.replicas)}", role, unit.gpus, "switching")
        self.states[unit.model] = replace(state, replicas=(*state.replicas, begun))
        return role

    def _move(self, unit: Unit, missing: int, *, is_fair: bool) -> int:
        """Take from others; what is missing still."""
        for donor in sorted(self.units.values(), key=lambda u: (u.pressure, u.name)):
            while missing and donor.model != unit.model and (stops := self._given(donor, unit, is_fair=is_fair)):
                reason = (
                    f"{unit.name} need {unit.need:.2f} and have {unit.have} (pressure {unit.pressure:.2f}); {donor.name} "
                    f"need {donor.need:.2f} and have {donor.have} (pressure {donor.pressure:.2f}), "
                    + ("less short" if is_fair else f"{donor.keep} would do")
                )
                ids = tuple(Stop(donor.model, r.replica_id) for r in stops)
                self.actions.append(MoveGpus(ids, unit.model, self._begin(unit), reason))
                given = math.fsum(r.gpus for r in stops)
                self.free -= max(0.0, unit.gpus - given)
                self.moved |= {donor.model, unit.model}
                missing -= 1
                have = donor.have - len(stops)
                donor = replace(donor, have=have, pressure=donor.pressure * donor.have / have if have else math.inf)
                self.units[donor.name] = donor
                if is_fair:
                    break
        return missing

    def _given(self, donor: Unit, unit: Unit, *, is_fair: bool) -> list[ReplicaState]:
        """Replicas that the donor can give for one of the unit, none where it cannot."""
        if not unit.gpus or not donor.gpus:
            return []
        count = max(1, math.ceil((unit.gpus - max(0.0, self.free)) / donor.gpus - ROUNDING))
        left = donor.sure - count
        if left < donor.least:
            return []
        if not is_fair:
            if left < donor.keep:
                return []
        else:
            after = self._pressure_with(donor, left)
            is_settled = self.settled[donor.model] and (self.settled[unit.model] or math.isinf(unit.pressure))
            if not is_settled or self._pressure_with(unit, unit.have) <= after * _FAIR:
                return []
        before = self.states[donor.model]
        stops = self._spare(donor, count)
        if len(stops) == count and self._has_free(unit.gpus - math.fsum(r.gpus for r in stops)):
            return stops
        self.states[donor.model] = before
        return []

    def _spare(self, unit: Unit, count: int) -> list[ReplicaState]:
        """Up to `count` replicas of a unit to stop, from the roles with least pressure; they count no more."""
        bounds, chosen = self._bounds(unit.model), list[ReplicaState]()
        for _ in range(count):
            state = self.states[unit.model]
            roles: tuple[Role, ...] = ("vision",) if unit.is_vision else ENGINE_ROLES
            able = [r for r in roles if idlest(state, r) and self._may_lose(state, bounds, r)]
            if not able:
                break
            role = min(able, key=lambda r: (self._pressure_of(state, r), r))
            replica = idlest(state, role)[0]
            chosen.append(replica)
            left = tuple(r for r in state.replicas if r.replica_id != replica.replica_id)
            self.states[unit.model] = replace(state, replicas=left)
        return chosen

    def _may_lose(self, state: ModelState, bounds: ModelBounds, role: Role) -> bool:
        pool = bounds.pool(role)
        count = state.count(role) - state.silent(role)
        if pool is not None and count <= pool.min_replicas:
            return False
        if role == "vision" or count > 1:
            return True
        return bool(state.count("mixed") - (role == "mixed")) or (
            role == "mixed" and bool(state.count("prefill") and state.count("decode"))
        )

    def _pressure_with(self, unit: Unit, count: int) -> float:
        """Of a unit with so many replicas in their best split: the same measure for who gives and who gets, so that what
        was moved is not moved back."""
        needs = self.needs[unit.model]
        if unit.is_vision:
            return unit.need / count if count else math.inf
        split = best_split(count, needs, self._bounds(unit.model)) if is_measured(needs) else None
        return split.pressure(needs) if split else unit.pressure if count >= unit.have else math.inf

    def _pressure_of(self, state: ModelState, role: Role) -> float:
        needs = self.needs[state.name]
        need = {"prefill": needs.prefill, "decode": needs.decode, "vision": needs.vision}.get(role) or 0.0
        return need / max(1, state.count(role))

    def _bounds(self, model: str) -> ModelBounds:
        return next(m for m in self.config.models if m.name == model)
