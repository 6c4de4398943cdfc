"""Tables of scaling decisions: cluster in, actions out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from ernie_cluster.config.pool import Role
from ernie_cluster.config.scaling import ModelBounds, PoolBounds, ScalingConfig, Targets
from ernie_cluster.errors import ConfigError
from ernie_cluster.policy.scaling.actions import (
    Action,
    MoveGpus,
    ScaleIn,
    ScaleOut,
    ScaleToZero,
    SwitchRole,
    WakeUp,
)
from ernie_cluster.policy.scaling.decide import decide
from ernie_cluster.policy.scaling.memory import Memory
from ernie_cluster.policy.scaling.snapshot import ModelState, ReplicaState, ScalingSnapshot, StageStats
from tests.unit.policy.clusters import bounds, config, loaded, replicas, run

SPLIT: tuple[Role, ...] = ("prefill", "decode")


def actions_of(limits: ScalingConfig, *states: ModelState) -> tuple[Action, ...]:
    return decide(ScalingSnapshot(states), limits, Memory(), 0.0).actions


def test_roles_switch_before_anything_starts() -> None:
    limits = config(bounds("m", SPLIT))
    (action,) = actions_of(limits, loaded("m", replicas(prefill=2, decode=4), 2.2, 1.0))
    assert isinstance(action, SwitchRole)
    assert (action.source, action.target, len(action.replica_ids)) == ("decode", "prefill", 1)
    assert "have 2 prefill + 4 decode" in action.reason


def test_the_idlest_switch_and_at_most_a_third_at_once() -> None:
    limits = config(bounds("m", SPLIT), total_gpus=12)
    there = replicas(prefill=3, decode=9)
    there = tuple(replace(r, load=float(i)) for i, r in enumerate(reversed(there)))
    (action,) = actions_of(limits, loaded("m", there, 7.0, 1.0))
    assert isinstance(action, SwitchRole)
    decode = sorted((r for r in there if r.role == "decode"), key=lambda r: r.load)
    assert action.replica_ids == tuple(r.replica_id for r in decode[:3])


def test_gpus_move_before_free_ones_are_taken() -> None:
    limits = config(bounds("a", SPLIT), bounds("b", SPLIT), total_gpus=10)
    needy, rich = (
        loaded("a", replicas(prefill=1, decode=1), 1.6, 1.4),
        loaded("b", replicas(prefill=3, decode=3), 0.5, 0.5),
    )
    actions = actions_of(limits, needy, rich)
    moves = [a for a in actions if isinstance(a, MoveGpus)]
    assert len(moves) >= 2
    assert {(m.model, s.model) for m in moves for s in m.stops} == {("a", "b")}
    assert not any(isinstance(a, ScaleOut) for a in actions[: len(moves)])


def test_free_gpus_are_taken_as_far_as_they_go() -> None:
    limits = config(bounds("m", SPLIT), total_gpus=5)
    (action,) = actions_of(limits, loaded("m", replicas(prefill=2, decode=2), 4.0, 4.0))
    assert isinstance(action, ScaleOut)
    assert action.count == 1


def test_what_cannot_be_had_is_noted() -> None:
    limits = config(bounds("m", SPLIT), total_gpus=4)
    decision = decide(ScalingSnapshot((loaded("m", replicas(prefill=2, decode=2), 4.0, 4.0),)), limits, Memory(), 0.0)
    assert decision.actions == ()
    assert "0 of 4 GPUs are free" in decision.notes[0]


def test_starting_replicas_count() -> None:
    limits = config(bounds("m", SPLIT), total_gpus=20)
    state = loaded("m", replicas(prefill=2, decode=2), 4.0, 4.0)
    assert {(a.role, a.count) for a in actions_of(limits, state) if isinstance(a, ScaleOut)} == {
        ("prefill", 3),
        ("decode", 3),
    }
    coming = tuple(replace(r, phase="starting") for r in replicas(prefill=4, decode=4))
    assert actions_of(limits, replace(state, replicas=(*state.replicas, *coming))) == ()


def test_a_larger_replica_takes_the_gpus_of_several() -> None:
    limits = config(bounds("large", ("mixed",), gpus=4.0), bounds("small", SPLIT), total_gpus=12)
    needy, rich = (
        loaded("large", replicas(4.0, mixed=1), 0.9, 0.6),
        loaded("small", replicas(prefill=4, decode=4), 0.3, 0.3),
    )
    (move,) = (a for a in actions_of(limits, needy, rich) if isinstance(a, MoveGpus))
    assert (move.model, move.role, len(move.stops)) == ("large", "mixed", 4)


def test_a_floor_is_never_taken() -> None:
    limits = config(bounds("a", SPLIT), bounds("b", SPLIT, floor=4), total_gpus=6)
    needy, rich = loaded("a", replicas(prefill=1, decode=1), 4, 4), loaded("b", replicas(prefill=2, decode=2), 0.1, 0.1)
    assert actions_of(limits, needy, rich) == ()


def test_less_only_after_long_enough() -> None:
    limits = config(bounds("m", SPLIT), total_gpus=8)
    _, log, _ = run({"m": loaded("m", replicas(prefill=4, decode=4), 0.8, 0.8)}, limits, 60)
    first, action = log[0]
    assert first >= limits.pace.down_delay_s
    assert isinstance(action, ScaleIn)


@pytest.mark.parametrize(
    ("held", "idle_s", "there", "kind"),
    [
        (0, 10.0, 2, None),
        (0, 40.0, 2, ScaleToZero),
        (1, 40.0, 2, None),
        (0, 99.0, 0, None),
        (1, 0.0, 0, WakeUp),
    ],
)
def test_asleep_and_awake(held: int, idle_s: float, there: int, kind: type | None) -> None:
    limits = config(bounds("m", SPLIT, floor=0, idle_to_zero_s=30.0))
    state = ModelState("m", replicas(prefill=there // 2, decode=there // 2), num_held=held, idle_s=idle_s)
    actions = actions_of(limits, state)
    assert [type(a) for a in actions] == ([kind] if kind else [])
    if kind is WakeUp:
        assert isinstance(actions[0], WakeUp)
        assert actions[0].roles == ("prefill", "decode")


def test_who_sleeps_is_woken_with_the_gpus_of_who_has_less_need() -> None:
    sleepy = bounds("b", ("mixed",), floor=0, idle_to_zero_s=30.0)
    limits = config(bounds("a", SPLIT), sleepy, total_gpus=4)
    (action,) = actions_of(
        limits, loaded("a", replicas(prefill=2, decode=2), 1.9, 1.9), ModelState("b", (), num_held=3)
    )
    assert isinstance(action, MoveGpus)
    assert (action.model, action.role, len(action.stops)) == ("b", "mixed", 1)


def test_who_sleeps_is_woken_whole_even_where_a_role_is_missing() -> None:
    """Two moves, and nothing measured of the model yet."""
    limits = config(bounds("a", SPLIT), bounds("b", SPLIT, floor=0, idle_to_zero_s=30.0), total_gpus=6)
    busy = loaded("a", replicas(prefill=3, decode=3), 0.5, 0.5)
    woken, _, _ = run({"a": busy, "b": ModelState("b", (), num_held=3)}, limits, 30)
    assert (woken["b"].count("prefill"), woken["b"].count("decode")) == (1, 1)


def test_who_is_woken_by_moves_gets_eyes_for_pictures_that_wait() -> None:
    limits = config(bounds("a", SPLIT), bounds("b", ("vision", "mixed"), floor=0, idle_to_zero_s=30.0), total_gpus=4)
    donor = loaded("a", replicas(prefill=2, decode=2), 0.5, 0.5)
    for waiting, eyes in ((500.0, 1), (0.0, 0)):
        held = ModelState("b", (), num_held=3, vision=StageStats(backlog_tokens=waiting))
        woken, _, _ = run({"a": donor, "b": held}, limits, 3)
        assert (woken["b"].count("mixed"), woken["b"].count("vision")) == (1, eyes)


def test_who_is_woken_for_pictures_gets_one_pair_of_eyes() -> None:
    limits = config(bounds("m", ("vision", "mixed"), floor=0, idle_to_zero_s=30.0), total_gpus=4)
    held = ModelState("m", (), num_held=3, vision=StageStats(requests_per_s=1.0, backlog_tokens=500.0))
    (action,) = actions_of(limits, held)
    assert isinstance(action, WakeUp)
    assert action.roles == ("mixed", "vision")


def test_fractions_of_a_core_add_up() -> None:
    """What sums of fractions leave over is neither free nor lacking."""
    limits = config(bounds("a", ("mixed",), 0.1), bounds("b", ("mixed",), 0.1, floor=0), total_gpus=0.3)
    asleep = ModelState("b", (), num_held=1)
    (action,) = actions_of(limits, ModelState("a", replicas(0.1, mixed=2)), asleep)
    assert isinstance(action, WakeUp)
    donor = loaded("a", replicas(0.1, mixed=3), 0.1, 0.1)
    (action,) = actions_of(limits, donor, asleep)
    assert isinstance(action, MoveGpus)
    assert ScalingConfig((ModelBounds("m", (PoolBounds("mixed", 0.1, min_replicas=3),)),), 0.3).total_gpus == 0.3


def test_a_lone_replica_does_both() -> None:
    limits = config(bounds("m"), total_gpus=1)
    (action,) = actions_of(limits, ModelState("m", (), prefill=StageStats(requests_per_s=1.0)))
    assert isinstance(action, WakeUp | ScaleOut)
    assert (action.role if isinstance(action, ScaleOut) else action.roles[0]) == "mixed"


def test_encoders_follow_their_own_queue() -> None:
    limits = config(bounds("m", (*SPLIT, "vision")))
    (action,) = actions_of(limits, loaded("m", replicas(prefill=1, decode=1, vision=1), 0.3, 0.3, vision=2.0))
    assert isinstance(action, ScaleOut)
    assert (action.role, action.count) == ("vision", 2)


def test_a_slow_stage_is_learnt() -> None:
    """The formula says that all is well, the clients do not: after a while more is asked for."""
    limits = config(bounds("m", SPLIT), total_gpus=20)
    state = loaded("m", replicas(prefill=2, decode=2), 1.2, 1.6)
    slow = replace(state, decode=replace(state.decode, latency_p90_s=0.2))
    assert run({"m": state}, limits, 90)[1] == []
    assert any(isinstance(a, ScaleOut) for _, a in run({"m": slow}, limits, 90)[1])


def test_nothing_is_switched_back_at_once() -> None:
    limits = config(bounds("m", SPLIT), total_gpus=8)
    state = loaded("m", replicas(prefill=4, decode=4), 5.0, 2.0)
    decision = decide(ScalingSnapshot((state,)), limits, Memory(), 0.0)
    assert isinstance(decision.actions[0], SwitchRole)
    back = loaded("m", replicas(prefill=5, decode=3), 5.0, 2.0)
    back = replace(back, decode=replace(back.decode, tokens_per_s=20_000.0))
    for second, expected in ((1.0, 0), (6.0, 1)):
        found = decide(ScalingSnapshot((back,)), limits, decision.memory, second).actions
        assert len([a for a in found if isinstance(a, SwitchRole)]) == expected


def test_what_an_operator_has_switched_is_not_switched_back_at_once() -> None:
    limits = config(bounds("m", SPLIT), total_gpus=8)
    state = loaded("m", replicas(prefill=1, decode=3), 2.0, 1.5)
    told = Memory().switched("m", "prefill", 1.0)
    for memory, second, expected in ((Memory(), 2.0, 1), (told, 2.0, 0), (told, 7.0, 1)):
        found = decide(ScalingSnapshot((state,)), limits, memory, second).actions
        assert sum(isinstance(a, SwitchRole) for a in found) == expected


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"pools": (PoolBounds("prefill", 1),)}, "cannot serve"),
        ({"pools": (PoolBounds("mixed", 1), PoolBounds("mixed", 1))}, "twice"),
        ({"idle_to_zero_s": 5.0}, "set floor: 0"),
        ({"floor": -1}, "floor = -1"),
    ],
)
def test_bounds_that_cannot_work_are_refused(fields: Mapping[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ModelBounds(**{"name": "m", "pools": (PoolBounds("mixed", 1),), **fields})  # type: ignore[arg-type]


def test_figures_that_cannot_work_are_refused() -> None:
    model = ModelBounds("m", (PoolBounds("mixed", 4, min_replicas=2),))
    with pytest.raises(ConfigError, match="hold 8 GPUs, the budget is 7"):
        ScalingConfig((model,), 7)
    with pytest.raises(ConfigError, match="more than once"):
        ScalingConfig((model, model), 20)
    with pytest.raises(ConfigError, match="ttft_s = 0"):
        Targets(ttft_s=0)
    with pytest.raises(ConfigError, match="max_replicas = 1 must be at least"):
        PoolBounds("mixed", 1, 2, 1)
    assert ReplicaState("r", "mixed", phase="planned").holds_gpus is False


def test_nobody_is_given_up_because_of_one_that_may_be_dead() -> None:
    """It counts, so that nothing is started for it; and it does not, so that nobody else stops."""
    limits = config(bounds("m", SPLIT))
    there = replicas(prefill=1, decode=3)
    for phase, stops in (("ready", 1), ("silent", 0)):
        state = loaded("m", (*there[:-1], replace(there[-1], phase=phase)), 0.5, 1.5)  # type: ignore[arg-type]
        memory, stopped = Memory(), list[ScaleIn]()
        for second in range(60):
            decision = decide(ScalingSnapshot((state,)), limits, memory, float(second))
            memory = decision.memory
            stopped += [a for a in decision.actions if isinstance(a, ScaleIn)]
            assert not [a for a in decision.actions if isinstance(a, ScaleOut)]
        assert bool(stopped) == bool(stops), phase


def test_nobody_gives_gpus_away_because_of_one_that_may_be_dead() -> None:
    limits = config(bounds("a", SPLIT), bounds("b", SPLIT), total_gpus=6)
    rich = replicas(prefill=2, decode=2)
    needy = loaded("a", replicas(prefill=1, decode=1), 1.6, 1.4)
    for phase, moves in (("ready", 1), ("silent", 0)):
        giver = loaded("b", tuple(replace(r, phase=phase) for r in rich[:2]) + rich[2:], 0.5, 0.5)  # type: ignore[arg-type]
        found = [a for a in actions_of(limits, needy, giver) if isinstance(a, MoveGpus)]
        assert bool(found) == bool(moves), phase
