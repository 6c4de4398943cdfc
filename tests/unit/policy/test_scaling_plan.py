"""The plan over a toy of Serve: it starts and stops what sizes say, and chooses by itself whom it stops."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ernie_cluster.config.pool import Role
from ernie_cluster.config.scaling import ScalingConfig
from ernie_cluster.policy.scaling.actions import MoveGpus, ScaleIn, ScaleOut, Stop, SwitchRole
from ernie_cluster.policy.scaling.decide import decide
from ernie_cluster.policy.scaling.memory import Memory
from ernie_cluster.policy.scaling.plan import Gang, Plan, PoolKey
from ernie_cluster.policy.scaling.roles import idlest
from ernie_cluster.policy.scaling.snapshot import ModelState, ScalingSnapshot
from tests.unit.policy.clusters import bounds, config, loaded

ROLES: tuple[Role, ...] = ("prefill", "decode")


@dataclass
class Toy:
    """Serve and its replicas. Starting takes `delay` looks; a gang that is to stop ends after as many."""

    gpus: dict[PoolKey, float]
    delay: int
    plan: Plan
    gangs: dict[str, Gang] = field(default_factory=dict)
    starting: list[tuple[PoolKey, int]] = field(default_factory=list)
    ending: dict[str, int] = field(default_factory=dict)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    @property
    def held(self) -> float:
        """GPUs of all that is alive or starts."""
        return sum(self.gpus[g.pool] for g in self.gangs.values()) + sum(self.gpus[p] for p, _ in self.starting)

    def settle(self) -> None:
        self.plan = self.plan.within(list(self.gangs.values())).settled(list(self.gangs.values()))

    def look(self) -> None:
        """Time passes: those that are to stop end, and Serve does what the plan's sizes ask for."""
        for gang_id in self.plan.stopping & self.gangs.keys():
            self.ending[gang_id] = self.ending.get(gang_id, self.delay) - 1
            if self.ending[gang_id] < 0:
                del self.gangs[gang_id]
        self.starting = [(pool, left - 1) for pool, left in self.starting]
        for pool, left in list(self.starting):
            if left < 0:
                self.starting.remove((pool, left))
                self.add(pool)
        for pool in self.gpus:
            running = [i for i, g in self.gangs.items() if g.pool == pool]
            pending = [entry for entry in self.starting if entry[0] == pool]
            wanted = self.plan.wanted(pool, running, self.plan.stopping - self.gangs.keys())
            assert len(running) <= wanted, "Serve would stop a replica of its own choice"
            for entry in pending[max(0, wanted - len(running)) :]:
                self.starting.remove(entry)
            self.starting += [(pool, self.delay)] * (wanted - len(running) - len(pending))

    def add(self, pool: PoolKey) -> Gang:
        gang = Gang(f"{pool[0]}/{pool[1]}/{next(self._numbers)}", pool[0], pool[1], pool[1])
        self.gangs[gang.gang_id] = gang
        return gang

    def carry_out(self, action: object) -> None:
        self.plan = self.plan.after(action, self.gangs.values())  # type: ignore[arg-type]
        if isinstance(action, SwitchRole):
            for i in self.gangs.keys() & set(action.replica_ids):
                self.gangs[i] = replace(self.gangs[i], role=action.target)

    def check(self, budget: float) -> None:
        assert self.held <= budget + 1e-9, f"{self.held} of {budget} GPUs are held"
        assert min(self.plan.counts.values(), default=0) >= 0


def toy(models: dict[str, float], delay: int) -> Toy:
    """Two prefill and two decode replicas of each model."""
    gpus: dict[PoolKey, float] = {(m, role): held for m, held in models.items() for role in ROLES}
    made = Toy(gpus, delay, Plan(dict.fromkeys(gpus, 2)))
    for pool in gpus:
        made.add(pool)
        made.add(pool)
    return made


LOADS = st.lists(st.tuples(*[st.floats(0, 5)] * 4), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@example([(2.5, 0.0, 4.0, 0.0), (0.0, 0.0, 0.0, 4.0)], 0, 1.0)  # one starts as it is given up
@given(LOADS, st.integers(0, 4), st.sampled_from([1.0, 2.0]))
def test_no_replica_is_stopped_that_was_not_chosen_and_the_budget_holds(
    loads: list[tuple[float, float, float, float]], delay: int, gpus_of_b: float
) -> None:
    budget = 4 + 4 * gpus_of_b
    limits: ScalingConfig = config(bounds("a", ROLES), bounds("b", ROLES, gpus_of_b), total_gpus=budget)
    serve, memory = toy({"a": 1.0, "b": gpus_of_b}, delay), Memory()
    for second in range(30 * len(loads)):
        prefill_a, decode_a, prefill_b, decode_b = loads[second // 30]
        serve.settle()
        there = serve.plan.states(serve.gangs.values(), serve.gpus)
        states = (
            loaded("a", tuple(there["a"]), prefill_a, decode_a),
            loaded("b", tuple(there["b"]), prefill_b, decode_b),
        )
        decision = decide(ScalingSnapshot(states), limits, memory, float(second))
        memory = decision.memory
        for action in decision.actions:
            serve.carry_out(action)
        serve.look()
        serve.check(budget)
    for _ in range(3 * delay + 6):  # nothing new: what was begun comes to its end
        serve.settle()
        serve.look()
        serve.check(budget)
    assert not serve.plan.stopping
    assert not serve.plan.moves
    assert not serve.plan.switching
    assert all(serve.plan.wanted(pool, ()) == sum(g.pool == pool for g in serve.gangs.values()) for pool in serve.gpus)


def test_a_move_starts_its_replica_when_the_others_have_ended() -> None:
    serve = toy({"a": 1.0, "b": 1.0}, 0)
    serve.carry_out(MoveGpus((Stop("a", "a/prefill/0"),), "b", "decode", "for a reason"))
    assert serve.plan.counts["b", "decode"] == 2
    assert serve.plan.wanted(("a", "prefill"), ["a/prefill/0", "a/prefill/1"]) == 2  # Serve is to choose nobody
    assert [r.phase for r in serve.plan.states(serve.gangs.values(), serve.gpus)["b"]] == ["ready"] * 4 + ["planned"]
    del serve.gangs["a/prefill/0"]
    assert serve.plan.wanted(("a", "prefill"), ["a/prefill/1"], ["a/prefill/0"]) == 1
    serve.settle()
    assert serve.plan.counts["b", "decode"] == 3
    assert not serve.plan.moves


def test_a_replica_that_fails_is_replaced_where_it_was() -> None:
    serve = toy({"a": 1.0}, 0)
    del serve.gangs["a/decode/2"]
    serve.settle()
    assert serve.plan.wanted(("a", "decode"), ["a/decode/3"]) == 2
    assert [r.phase for r in serve.plan.states(serve.gangs.values(), serve.gpus)["a"]].count("starting") == 1


def test_what_has_not_started_is_taken_back_or_starts_in_another_pool() -> None:
    serve = toy({"a": 1.0}, 0)
    serve.carry_out(ScaleOut("a", "decode", 2, "for a reason"))
    coming = [r for r in serve.plan.states(serve.gangs.values(), serve.gpus)["a"] if r.phase == "starting"]
    serve.carry_out(SwitchRole("a", (coming[0].replica_id,), "decode", "prefill", "for a reason"))
    assert (serve.plan.counts["a", "prefill"], serve.plan.counts["a", "decode"]) == (2, 3)
    serve.settle()
    assert (serve.plan.counts["a", "prefill"], serve.plan.counts["a", "decode"]) == (3, 3)
    serve.carry_out(ScaleIn("a", "decode", ("starting/0/decode",), "for a reason"))
    assert (serve.plan.counts["a", "prefill"], serve.plan.counts["a", "decode"]) == (3, 2)


def test_a_switch_is_over_when_nothing_of_the_former_work_is_left() -> None:
    serve = toy({"a": 1.0}, 0)
    serve.carry_out(SwitchRole("a", ("a/decode/2",), "decode", "prefill", "for a reason"))
    busy = replace(serve.gangs["a/decode/2"], num_answers=1)
    assert serve.plan.settled([busy]).phase(busy) == "switching"
    idle = replace(busy, num_answers=0, num_prompts=3)
    assert serve.plan.settled([idle]).phase(idle) == "ready"


def test_a_stop_that_is_taken_back_leaves_no_trace() -> None:
    serve = toy({"a": 1.0}, 0)
    before = serve.plan
    serve.carry_out(ScaleIn("a", "decode", ("a/decode/2",), "for a reason"))
    assert serve.plan.phase(serve.gangs["a/decode/2"]) == "draining"
    kept = serve.plan.kept(serve.gangs["a/decode/2"])
    assert (dict(kept.counts), kept.stopping) == (dict(before.counts), before.stopping)


def test_a_stop_that_is_taken_back_takes_the_move_with_it_that_it_was_for() -> None:
    serve = toy({"a": 1.0, "b": 1.0}, 0)
    serve.carry_out(MoveGpus((Stop("a", "a/prefill/0"), Stop("a", "a/decode/2")), "b", "decode", "for a reason"))
    kept = serve.plan.kept(serve.gangs["a/decode/2"]).settled(list(serve.gangs.values()))
    assert not kept.moves, "nobody frees what it was to hold"
    assert (kept.counts["b", "decode"], kept.stopping) == (2, frozenset({"a/prefill/0"}))


def test_serve_stops_nobody_whom_it_does_not_know_yet() -> None:
    """Its controller was started again, and asks each replica first."""
    plan = Plan({("a", "decode"): 2}, stopping=frozenset({"a/decode/3", "a/prefill/9", "a/decode/sub/decode/1"}))
    assert plan.wanted(("a", "decode"), []) == 3
    assert plan.wanted(("a", "decode"), ["a/decode/1", "a/decode/2", "a/decode/3"]) == 3
    assert plan.wanted(("a", "decode"), ["a/decode/1", "a/decode/2"], gone=["a/decode/3"]) == 2
    assert plan.wanted(("a", "decode"), ["a/decode/1"], gone=["a/decode/3"]) == 2, "who fails is replaced"


def test_who_was_started_when_it_was_too_late_stops_as_one_that_is_chosen() -> None:
    serve = toy({"a": 1.0}, 0)
    serve.carry_out(ScaleOut("a", "decode", 1, "for a reason"))
    serve.add(("a", "decode"))
    serve.carry_out(ScaleIn("a", "decode", ("starting/0/decode",), "it had not started at the last look"))
    assert serve.plan.wanted(("a", "decode"), [i for i in serve.gangs if "decode" in i]) == 3
    busy = [replace(g, load=1.0) if g.gang_id == "a/decode/2" else g for g in serve.gangs.values()]
    plan = serve.plan.within(busy)
    assert (plan.stopping, dict(plan.counts)) == (frozenset({"a/decode/3"}), dict(serve.plan.counts))
    assert plan.within(busy) == plan


def test_what_was_to_start_elsewhere_waits_for_one_that_had_started_already() -> None:
    serve = toy({"a": 1.0, "b": 1.0}, 0)
    serve.carry_out(ScaleOut("a", "decode", 1, "for a reason"))
    serve.carry_out(MoveGpus((Stop("a", "starting/0/decode"),), "b", "decode", "for a reason"))
    late = serve.add(("a", "decode"))
    serve.settle()
    (chosen,) = serve.plan.stopping
    assert serve.gangs[chosen].pool == late.pool
    assert serve.plan.counts["b", "decode"] == 2
    del serve.gangs[chosen]
    serve.settle()
    assert (serve.plan.counts["b", "decode"], serve.plan.moves) == (3, ())


def test_who_is_silent_counts_and_is_told_nothing() -> None:
    plan = Plan({("a", "decode"): 2}, switching=frozenset({"a/decode/0"}))
    gangs = [Gang(f"a/decode/{i}", "a", "decode", "decode", is_silent=True) for i in range(2)]
    there = plan.settled(gangs).states(gangs, {("a", "decode"): 1.0})["a"]
    assert [(r.replica_id, r.phase, r.counts) for r in there] == [(g.gang_id, "silent", True) for g in gangs]
    assert plan.settled(gangs) == plan, "it may still finish its former work"
    assert not idlest(ModelState("a", tuple(there)), "decode")


def test_another_comes_for_one_that_leaves_and_nothing_is_added_for_it() -> None:
    """Serve replaces whom it has not stopped itself: it counts as what starts in its place."""
    serve = toy({"a": 1.0}, 0)
    leaving = replace(serve.gangs["a/decode/2"], is_draining=True, is_leaving=True)
    gangs = [*(g for i, g in serve.gangs.items() if i != leaving.gang_id), leaving]
    phases = {r.replica_id: r.phase for r in serve.plan.states(gangs, serve.gpus)["a"]}
    assert phases[leaving.gang_id] == "draining"
    assert phases["starting/0/decode"] == "starting"
    assert serve.plan.within(gangs) == serve.plan


@pytest.mark.parametrize("is_listed", [True, False])
def test_who_is_over_the_plan_is_not_there_for_others_to_stop(is_listed: bool) -> None:
    """Given up while it started, and there before Serve has stopped it: no other is to stop for it."""
    serve = toy({"a": 1.0}, 0)
    late = replace(serve.add(("a", "decode")), is_listed=is_listed, load=0.0 if is_listed else 5.0)
    gangs = [*(g for i, g in serve.gangs.items() if i != late.gang_id), late]
    there = serve.plan.states(gangs, serve.gpus)["a"]
    assert len([r for r in there if r.counts]) == 4
    assert is_listed or {r.replica_id for r in there if not r.counts} == {late.gang_id}


def test_nobody_is_over_where_there_is_no_plan() -> None:
    gangs = toy({"a": 1.0}, 0).gangs.values()
    assert {r.phase for r in Plan({}).states(gangs, {("a", role): 1.0 for role in ROLES})["a"]} == {"ready"}
