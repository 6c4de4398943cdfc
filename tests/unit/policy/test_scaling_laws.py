"""The scaling decision: never over budget, within bounds, monotone, at rest under constant load, nobody starves."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_cluster.config.scaling import PoolBounds, ScalingConfig
from ernie_cluster.policy.scaling.actions import ScaleToZero, SwitchRole
from ernie_cluster.policy.scaling.decide import decide
from ernie_cluster.policy.scaling.memory import Memory, ModelMemory, remembered
from ernie_cluster.policy.scaling.needs import Needs, needs_of, replicas_for_wait, wait_p90_s
from ernie_cluster.policy.scaling.roles import Split, best_split, replicas_for
from ernie_cluster.policy.scaling.snapshot import ENGINE_ROLES, ModelState, ReplicaState, ScalingSnapshot
from ernie_cluster.sums import Sums
from tests.unit.policy.clusters import (
    TARGETS,
    bounds,
    config,
    loaded,
    replicas,
    run,
    started_gpus,
    stopped,
)

LOADS = st.floats(0.0, 6.0)
FEW = st.integers(0, 3)
PHASES = st.sampled_from(["ready", "ready", "ready", "starting", "switching", "silent", "draining", "planned"])


@st.composite
def states(draw: st.DrawFn, name: str, gpus: float) -> ModelState:
    there = replicas(gpus, prefill=draw(FEW), decode=draw(FEW), mixed=draw(FEW), vision=draw(FEW))
    there = tuple(replace(r, phase=draw(PHASES), load=draw(st.floats(0, 9))) for r in there)
    state = loaded(name, there, draw(LOADS), draw(LOADS), draw(st.sampled_from([0.0, 0.7])))
    return replace(
        state,
        prefill=replace(state.prefill, backlog_tokens=draw(st.sampled_from([0.0, 1e4, 1e6]))),
        num_held=draw(st.integers(0, 2)),
        idle_s=draw(st.sampled_from([0.0, 100.0])),
    )


@st.composite
def clusters(draw: st.DrawFn) -> tuple[ScalingConfig, ScalingSnapshot]:
    """Two models of different size, more or less fitting into the budget."""
    small, large = draw(states("small", 1.0)), draw(states("large", 2.0))
    roles = ("prefill", "decode", "mixed", "vision")
    idle_s = draw(st.sampled_from([None, 50.0]))
    floor = 0 if idle_s else draw(st.integers(0, 2))
    models = tuple(
        replace(
            bounds(name, roles, gpus, floor=floor, idle_to_zero_s=idle_s),
            pools=tuple(
                PoolBounds(role, gpus, 0 if idle_s else draw(st.integers(0, 1)), draw(st.integers(4, 9)))
                for role in roles
            ),
        )
        for name, gpus in (("small", 1.0), ("large", 2.0))
    )
    used = sum(r.gpus for s in (small, large) for r in s.replicas)
    return config(*models, total_gpus=max(12.0, used + draw(st.integers(-3, 6)))), ScalingSnapshot((small, large))


@settings(max_examples=50, deadline=None)
@given(clusters(), st.floats(0, 100))
def test_a_decision_keeps_to_budget_and_bounds(cluster: tuple[ScalingConfig, ScalingSnapshot], now_s: float) -> None:
    limits, snapshot = cluster
    there = [r for m in snapshot.models for r in m.replicas]
    old = Memory(0.0, tuple((m.name, ModelMemory(low_since_s=0.0, vision_low_since_s=0.0)) for m in snapshot.models))
    actions = decide(snapshot, limits, old, now_s).actions

    ended, held = stopped(actions), sum(r.gpus for r in there if r.holds_gpus)
    started, moved = started_gpus(actions, limits, moved=False), started_gpus(actions, limits, moved=True)
    if started:
        assert held + started <= limits.total_gpus + 1e-9
    if started or moved:
        kept = sum(r.gpus for r in there if r.counts and r.replica_id not in ended)
        assert kept + started + moved <= limits.total_gpus + 1e-9

    switched = [i for a in actions if isinstance(a, SwitchRole) for i in a.replica_ids]
    by_id = {r.replica_id: r for r in there}
    assert len(set(ended)) == len(ended)
    assert len(set(switched)) == len(switched)
    assert set(switched).isdisjoint(ended) or any(isinstance(a, ScaleToZero) for a in actions)
    assert all(by_id[i].counts for i in ended)
    assert all(by_id[i].phase in ("planned", "starting", "ready") for i in switched)
    assert all(a.reason and any(c.isdigit() for c in a.reason) for a in actions)
    for model in limits.models:
        state = next(s for s in snapshot.models if s.name == model.name)
        gone = [r for r in state.replicas if r.replica_id in ended]
        engines = [r for r in state.replicas if r.counts and r.role in ENGINE_ROLES]
        if gone and any(r.role in ENGINE_ROLES for r in gone) and model.idle_to_zero_s is None:
            assert len([r for r in engines if r not in gone]) >= model.floor


LINES = st.tuples(st.floats(0.01, 50), st.floats(0.005, 3), st.floats(0, 2), st.floats(0.05, 5))


@given(LINES)
def test_the_wait_is_met_by_the_fewest_replicas(line: tuple[float, float, float, float]) -> None:
    load, service_s, variation, wait_s = line
    enough = replicas_for_wait(load, service_s, variation, wait_s)
    assert load / enough <= 0.921
    assert wait_p90_s(enough, load, service_s, variation) <= wait_s * (1 + 1e-6)
    fewer = enough * 0.98
    assert load / fewer > 0.92 or wait_p90_s(fewer, load, service_s, variation) > wait_s


@given(LOADS, LOADS, st.floats(1.0, 2.0), st.floats(1.0, 2.0))
def test_more_load_never_needs_less(prefill: float, decode: float, more: float, longer: float) -> None:
    limits = config(bounds("m"))

    def needs(p: float, d: float) -> tuple[Needs, int]:
        state = loaded("m", replicas(prefill=2, decode=2), p, d)
        found = needs_of(state, remembered(ModelMemory(), state, limits.pace, None), TARGETS)
        return found, replicas_for(found, limits.models[0], 1.0)

    (less, few), (greater, many) = needs(prefill, decode), needs(prefill * more, decode * longer)
    assert less.prefill is not None
    assert less.decode is not None
    assert greater.prefill is not None
    assert greater.decode is not None
    assert (less.prefill, less.decode) <= (greater.prefill + 1e-6, greater.decode + 1e-6)
    assert less.decode <= greater.decode + 1e-6
    assert few <= many


@given(st.integers(1, 12), st.floats(0, 9), st.floats(0, 9), st.booleans())
def test_the_best_split_is_the_best_of_all(total: int, prefill: float, decode: float, has_mixed: bool) -> None:
    limits = bounds("m", ("prefill", "decode", "mixed") if has_mixed else ("prefill", "decode"))
    needs = Needs(prefill, decode, None)
    most_mixed = min(total, 1) if has_mixed else 0
    every = [Split(p, total - m - p, m) for m in range(most_mixed + 1) for p in range(total - m + 1)]
    least = min((s.pressure(needs) for s in every if s.serves), default=math.inf)
    found = best_split(total, needs, limits)
    if found is None:
        assert math.isinf(least)
    else:
        assert found.total == total
        assert found.pressure(needs) <= least + 1e-9


@settings(max_examples=10, deadline=None)
@given(st.tuples(LOADS, LOADS), st.tuples(LOADS, LOADS), st.tuples(FEW, FEW, FEW), st.integers(4, 16))
def test_constant_load_comes_to_rest(
    first: tuple[float, float], second: tuple[float, float], there: tuple[int, int, int], total: int
) -> None:
    """Whatever the start: after a while nothing is done any more, and nothing was done twice to and fro."""
    limits = config(bounds("a"), bounds("b"), total_gpus=float(total))
    p, d, m = there
    cluster = {
        "a": loaded("a", replicas(prefill=p, decode=d, mixed=m)[:total], *first),
        "b": loaded("b", (), *second),
    }
    settled, log, memory = run(cluster, limits, 60)
    assert len(log) <= 60
    rest, after, _ = run(settled, limits, 40, memory)
    assert [a for _, a in after] == []
    assert {n: len(s.replicas) for n, s in rest.items()} == {n: len(s.replicas) for n, s in settled.items()}


@pytest.mark.parametrize("total", [4, 6, 9])
def test_nobody_starves_when_all_want_more_than_there_is(total: int) -> None:
    limits = config(bounds("a", floor=1), bounds("b", floor=1), total_gpus=float(total))
    cluster = {
        "a": loaded("a", replicas(prefill=total // 2, decode=total - total // 2), 8.0, 8.0),
        "b": loaded("b", (), 4.0, 4.0),
    }
    settled, _, _ = run(cluster, limits, 60)
    sizes = {name: len(s.replicas) for name, s in settled.items()}
    assert sum(sizes.values()) == total
    assert sizes["a"] / sizes["b"] == pytest.approx(2.0, abs=1.01)


@given(st.lists(st.tuples(st.floats(1, 1e5), st.floats(1e-3, 1.0)), max_size=8))
def test_a_measured_line_is_never_negative(points: list[tuple[float, float]]) -> None:
    base_s, per_unit_s = Sums.of(*points).line
    assert base_s >= -1e-9
    assert per_unit_s >= 0


def test_a_measured_line_is_found() -> None:
    assert Sums.of((10, 0.3), (20, 0.4), (40, 0.6)).line == pytest.approx((0.2, 0.01))


def test_states_without_replicas_or_measurements_are_let_be() -> None:
    limits = config(bounds("m", floor=0))
    decision = decide(ScalingSnapshot((ModelState("m", ()), ModelState("unknown", ()))), limits, Memory(), 0.0)
    assert decision.actions == ()
    assert ReplicaState("r", "mixed").counts
