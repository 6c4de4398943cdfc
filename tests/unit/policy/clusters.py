"""Clusters for tests of the scaling policy: models with measured rates, and what actions make of them at once."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ernie_cluster.config.pool import Role
from ernie_cluster.config.scaling import ModelBounds, PoolBounds, ScalingConfig, ScalingPace, Targets
from ernie_cluster.policy.scaling.actions import (
    Action,
    MoveGpus,
    ScaleIn,
    ScaleOut,
    ScaleToZero,
    SwitchRole,
    WakeUp,
)
from ernie_cluster.policy.scaling.decide import Decision, decide
from ernie_cluster.policy.scaling.memory import Memory
from ernie_cluster.policy.scaling.snapshot import ModelState, ReplicaState, ScalingSnapshot, StageStats
from ernie_cluster.sums import Sums

TARGETS = Targets(ttft_s=2.0, tpot_s=0.05, queue_s=1.0)
PROMPTS = Sums.of((500.0, 0.05), (1500.0, 0.15))
"""10,000 tokens per second, 1,000 on average."""
STEPS = Sums.of((10_000.0, 0.02), (30_000.0, 0.03))
"""15 ms and 0.5 us per KV token: 65,000 of them in 47.5 ms."""

_numbers = itertools.count()


def replicas(gpus: float = 1.0, **counts: int) -> tuple[ReplicaState, ...]:
    """`replicas(prefill=2, decode=1)`: all of them ready."""
    return tuple(
        ReplicaState(f"{role}-{next(_numbers)}", role, gpus)  # type: ignore[arg-type]
        for role, count in counts.items()
        for _ in range(count)
    )


def loaded(
    name: str, there: tuple[ReplicaState, ...], prefill: float, decode: float, vision: float = 0.0
) -> ModelState:
    """A model whose stages have work for about so many replicas, at full use."""
    return ModelState(
        name,
        there,
        prefill=StageStats(10 * prefill, 10_000 * prefill, samples=PROMPTS),
        decode=StageStats(10 * prefill, decode * 65 / 0.0475, samples=STEPS),
        vision=StageStats(10 * vision, 10_000 * vision, samples=PROMPTS if vision else Sums()),
        kv_tokens=100_000,
        context_tokens=1000,
    )


def bounds(
    name: str, roles: Sequence[Role] = ("prefill", "decode", "mixed"), gpus: float = 1.0, **fields: object
) -> ModelBounds:
    return ModelBounds(name, tuple(PoolBounds(r, gpus) for r in roles), TARGETS, **fields)  # type: ignore[arg-type]


def config(*models: ModelBounds, total_gpus: float = 8.0) -> ScalingConfig:
    return ScalingConfig(models, total_gpus, ScalingPace(settle_s=5.0, down_delay_s=10.0, memory_s=20.0))


def applied(state: ModelState, actions: Sequence[Action], limits: ScalingConfig) -> ModelState:
    """The model after all actions, as if they took no time."""
    there = {r.replica_id: r for r in state.replicas}
    for action in actions:
        if isinstance(action, MoveGpus):
            for stop in action.stops:
                there.pop(stop.replica_id, None)
        if action.model != state.name:
            continue
        if isinstance(action, SwitchRole):
            there |= {i: replace(there[i], role=action.target) for i in action.replica_ids}
        elif isinstance(action, (ScaleIn, ScaleToZero)):
            for replica_id in action.replica_ids:
                del there[replica_id]
        else:
            for role in _started(action):
                pool = next(m for m in limits.models if m.name == state.name).pool(role)
                assert pool is not None
                new = ReplicaState(f"{role}-{next(_numbers)}", role, pool.gpus)
                there[new.replica_id] = new
    return replace(state, replicas=tuple(there.values()))


def _started(action: MoveGpus | ScaleOut | WakeUp) -> tuple[Role, ...]:
    if isinstance(action, WakeUp):
        return action.roles
    return (action.role,) * (action.count if isinstance(action, ScaleOut) else 1)


def started_gpus(actions: Sequence[Action], limits: ScalingConfig, *, moved: bool) -> float:
    """GPUs of what the actions start, either by moves or at once."""
    total = 0.0
    for action in actions:
        if isinstance(action, (MoveGpus, ScaleOut, WakeUp)) and isinstance(action, MoveGpus) == moved:
            model = next(m for m in limits.models if m.name == action.model)
            total += sum(pool.gpus for role in _started(action) if (pool := model.pool(role)))
    return total


def stopped(actions: Sequence[Action]) -> list[str]:
    """Ids of the replicas that are to end."""
    ids: list[str] = []
    for action in actions:
        if isinstance(action, MoveGpus):
            ids += [s.replica_id for s in action.stops]
        elif isinstance(action, (ScaleIn, ScaleToZero)):
            ids += action.replica_ids
    return ids


def run(
    states: Mapping[str, ModelState], limits: ScalingConfig, seconds: int, memory: Memory | None = None
) -> tuple[dict[str, ModelState], list[tuple[int, Action]], Memory]:
    """Decide once a second under constant load, with actions that take no time."""
    now, log, memory = dict(states), list[tuple[int, Action]](), memory or Memory()
    start = 0 if memory.at_s is None else int(memory.at_s) + 1
    for second in range(start, start + seconds):
        decision: Decision = decide(ScalingSnapshot(tuple(now.values())), limits, memory, float(second))
        memory = decision.memory
        log += [(second, a) for a in decision.actions]
        now = {name: applied(s, decision.actions, limits) for name, s in now.items()}
    return now, log, memory
