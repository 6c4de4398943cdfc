"""The one scaling decision over all pools of all models: a snapshot and a memory in, actions with reasons and a memory out.

In this order: roles within a model, GPUs between models, free GPUs, less. Knows no clock, no replica and no Ray; who calls
it does so every second or so, carries out what it says, and shows the effect in the next snapshot (see `actions`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ernie_cluster.config.scaling import ModelBounds, ScalingConfig
from ernie_cluster.policy.scaling.actions import Action, ScaleToZero
from ernie_cluster.policy.scaling.memory import Memory, ModelMemory, corrected, remembered
from ernie_cluster.policy.scaling.needs import Needs, needs_of, role_needs
from ernie_cluster.policy.scaling.resize import Ledger, free_gpus
from ernie_cluster.policy.scaling.roles import Split, is_measured, switch_roles, switched
from ernie_cluster.policy.scaling.snapshot import ModelState, ScalingSnapshot
from ernie_cluster.policy.scaling.units import GROW_AT, Unit, is_asleep, units_of


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do, and what to remember for the next decision."""

    actions: tuple[Action, ...]
    """To be begun in this order; each says why."""
    notes: tuple[str, ...]
    """What would have been done, and what it lacked."""
    needs: tuple[tuple[str, Needs], ...]
    """By model, for metrics."""
    memory: Memory


def decide(snapshot: ScalingSnapshot, config: ScalingConfig, memory: Memory, now_s: float) -> Decision:
    """Decide what to change, if anything.

    Args:
        snapshot: measured since the decision that returned `memory`.
        now_s: on a clock that never runs backwards, the same one in every call.
    """
    dt_s = None if memory.at_s is None else max(0.0, now_s - memory.at_s)
    known = {m.name: m for m in config.models}
    states = {s.name: s for s in snapshot.models if s.name in known}
    memories, needs, peaks = dict[str, ModelMemory](), dict[str, Needs](), dict[str, Needs]()
    actions: list[Action] = []
    for name, state in states.items():
        bounds = known[name]
        memories[name] = remembered(memory.of(name), state, config.pace, dt_s)
        needs[name] = needs_of(state, memories[name], bounds.targets)
        peaks[name] = needs_of(state, memories[name], bounds.targets, at_peak=True)
        memories[name] = _learnt(memories[name], state, needs[name], bounds, dt_s or 0.0)
        switch = switch_roles(
            state, memories[name], role_needs(state, memories[name], bounds.targets), bounds, config.pace, now_s
        )
        if switch is not None:
            actions.append(switch)
            states[name] = switched(state, switch)
            memories[name] = replace(memories[name], switched_s=now_s, switched_from=switch.source)

    awake = {name: s for name, s in states.items() if not is_asleep(s, known[name])}
    units = {u.name: u for name, s in awake.items() for u in units_of(s, known[name], needs[name], peaks[name])}
    ledger = Ledger(
        config=config,
        now_s=now_s,
        states=dict(states),
        needs=needs,
        units=dict(units),
        settled={name: now_s - m.taken_s >= config.pace.settle_s for name, m in memories.items()},
        free=free_gpus(snapshot, config.total_gpus),
    )
    ledger.grow()
    for name in ledger.moved:
        memories[name] = replace(memories[name], taken_s=now_s)
    touched = {a.model for a in (*actions, *ledger.actions)} | ledger.moved
    for name, state in awake.items():
        sleep = _sleep(state, known[name])
        if sleep is not None and name not in touched:
            ledger.actions.append(sleep)
            continue
        for unit in (u for u in units.values() if u.model == name):
            memories[name] = _shrink(unit, memories[name], ledger, is_busy=name in touched)
    return Decision(
        actions=(*actions, *ledger.actions),
        notes=tuple(ledger.notes),
        needs=tuple(needs.items()),
        memory=Memory(now_s, tuple(memories.items())),
    )


def _learnt(memory: ModelMemory, state: ModelState, needs: Needs, bounds: ModelBounds, dt_s: float) -> ModelMemory:
    """Compare formula and measurement, where nothing changes and the formula sees nothing short."""
    is_steady = all(r.phase in ("ready", "planned") for r in state.replicas)
    split = Split.of(state)
    if not (is_steady and is_measured(needs) and split.pressure(needs) <= GROW_AT):
        return memory
    targets = bounds.targets
    return replace(
        memory,
        prefill=corrected(memory.prefill, state.prefill.latency_p90_s, targets.ttft_s, dt_s),
        decode=corrected(memory.decode, state.decode.latency_p90_s, targets.tpot_s, dt_s),
    )


def _shrink(unit: Unit, memory: ModelMemory, ledger: Ledger, *, is_busy: bool) -> ModelMemory:
    """Let a unit give up what it has not needed for long enough; the model's memory afterwards."""
    now_s = ledger.now_s
    since = memory.vision_low_since_s if unit.is_vision else memory.low_since_s
    if unit.sure <= unit.keep or is_busy:
        since = None
    elif since is None:
        since = now_s
    elif now_s - since >= ledger.config.pace.down_delay_s:
        ledger.shrink(unit, now_s - since)
        since = now_s
    return replace(memory, vision_low_since_s=since) if unit.is_vision else replace(memory, low_since_s=since)


def _sleep(state: ModelState, bounds: ModelBounds) -> ScaleToZero | None:
    limit_s = bounds.idle_to_zero_s
    there = tuple(r.replica_id for r in state.replicas if r.counts)
    if limit_s is None or state.idle_s < limit_s or state.num_held or not there:
        return None
    return ScaleToZero(state.name, there, f"no request for {state.idle_s:.0f} s, limit {limit_s:.0f} s")
