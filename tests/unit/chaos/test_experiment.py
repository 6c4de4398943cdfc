"""An experiment on systems that are sound, and on some that are not: each way to fail is seen, and nothing else."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_cluster.api.operator import ClusterView, FaultsView, FaultView, ModelView, ReplicaView
from ernie_cluster.chaos import blows, experiment
from ernie_cluster.chaos.blows import AtPoint
from ernie_cluster.chaos.experiment import Experiment, Plan
from ernie_cluster.chaos.load import references
from ernie_cluster.chaos.prompts import Prompt
from ernie_cluster.chaos.report import Report
from ernie_cluster.chaos.rest import held
from ernie_cluster.chaos.stages import SHAPES, STAGES, Wound, endless, possible, victims
from ernie_cluster.chaos.stream import Answer, Outcome
from ernie_cluster.errors import ReplicaLost
from ernie_cluster.faults import FaultOrder

KILL = AtPoint(Wound(next(s for s in STAGES if s.name == "mid-decode"), "kill"))
PROMPTS = [Prompt(name, {}) for name in ("a", "b")]
DECODE = ReplicaView("m/decode/1", "m", "decode", "decode", "ready", "n", 0.0, free_blocks=9, total_blocks=9)
CALM = ClusterView((ModelView("m", True, "", 0),), (DECODE,), False, 1.0, 1.0, "cores", ())


@dataclass
class System:
    """A sound system that loses a replica when it is struck, and has another one a few looks later.

    What is wrong with it comes as functions of whether it was struck.
    """

    answer: Callable[[str, bool], Answer] = lambda prompt, _: Answer(prompt, "stop")
    kind: Callable[[bool], Any] = lambda _: "whole"
    leaked_blocks: int = 0
    meets: bool = True
    heals: bool = True
    orders: list[FaultOrder] = field(default_factory=list)
    num_looks: int = 0

    @property
    def is_struck(self) -> bool:
        return self.meets and any(order.kind == "add" for order in self.orders)

    def view(self) -> ClusterView:
        if not self.is_struck:
            return CALM
        self.num_looks += 1
        if self.num_looks == 1:
            raise ReplicaLost("the router is busy")
        if self.num_looks < 4 or not self.heals:
            return replace(CALM, replicas=())
        return replace(CALM, replicas=(replace(DECODE, replica="m/decode/2", free_blocks=9 - self.leaked_blocks),))

    def faults(self, order: FaultOrder) -> FaultsView:
        self.orders.append(order)
        rules = [o.rule for o in self.orders if o.rule is not None]
        return FaultsView(() if self.meets else tuple(FaultView("d", r, 1.0, 0, 0) for r in rules), ())

    async def ask(self, prompt: Prompt) -> Outcome:
        began_s, struck = time.monotonic(), self.is_struck
        await asyncio.sleep(0.001)
        kind = self.kind(struck)
        answer = self.answer(prompt.name, struck) if kind == "whole" else None
        return Outcome(prompt.name, began_s, time.monotonic(), answer, "" if answer else "trouble", kind)


@pytest.fixture(autouse=True)
def _swift(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, value in (
        (experiment, "_LOOK_S", 0.002),
        (experiment, "_RECOVER_S", 0.2),
        (experiment, "_SETTLE_S", 0.05),
        (blows, "_LOOK_S", 0.002),
        (blows, "STRIKE_S", 0.1),
    ):
        monkeypatch.setattr(module, name, value)


def run(system: System, volleys: Sequence[Sequence[AtPoint]] = ((KILL,),)) -> Report:
    plan = Plan("m", 0, 2, calm_s=0.02, faults_s=60.0, after_s=0.02, may_break=False)
    return asyncio.run(Experiment(system, system.ask, PROMPTS, volleys, plan, lambda _: None).run())


def test_a_sound_system_passes() -> None:
    report = run(System())
    assert report.objections == [], report.text()
    assert [(f.victim, f.did_strike, f.recovered_s is not None) for f in report.faults] == [("m/decode/1", True, True)]
    assert min(report.calm.requests, report.faulty.requests, report.after.requests) > 0
    assert "passed" in report.text()
    assert report.to_json()["passed"] is True


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"answer": lambda prompt, struck: Answer(prompt + "!" * struck, "stop")}, "wrong"),
        ({"answer": lambda prompt, struck: Answer(prompt, "length" if struck else "stop")}, "wrong"),
        ({"kind": lambda struck: "lost" if struck else "whole"}, "lost"),
        ({"kind": lambda struck: "hung" if struck else "whole"}, "hung"),
        ({"leaked_blocks": 1}, "1 KV blocks (calm: 0)"),
        ({"heals": False}, "no recovery"),
    ],
)
def test_each_way_to_fail_is_seen(fault: dict[str, Any], words: str) -> None:
    report = run(System(**fault))
    assert any(words in objection for objection in report.objections), report.text()
    assert "FAILED" in report.text()


def test_a_fault_that_nothing_meets_is_told_and_fails_nobody() -> None:
    report = run(System(meets=False))
    assert [f.did_strike for f in report.faults] == [False]
    assert (report.objections, "did not strike" in report.text()) == ([], True)


def test_faults_are_ended_before_and_after() -> None:
    system = System()
    run(system)
    assert system.orders[0].kind == system.orders[-1].kind == "clear"


def test_prompts_that_have_no_one_answer_judge_nobody() -> None:
    outcomes = [
        Outcome(p, 0.0, 1.0, Answer(text, "stop"), "", "whole") for p, text in (("a", "x"), ("a", "y"), ("b", "z"))
    ]
    expected = references(outcomes)
    assert (expected.unsteady, expected.is_wrong(outcomes[0])) == (("a",), False)
    assert expected.is_wrong(replace(outcomes[2], answer=Answer("other", "stop")))


def test_every_stage_can_be_struck_and_every_wound_is_a_fault() -> None:
    wounds = possible({stage.role for stage in STAGES}, SHAPES)
    assert {wound.stage for wound in wounds} == set(STAGES)
    assert len({wound.name for wound in wounds}) == len(wounds)
    assert all(wound.rule("x").replica == "x" for wound in wounds)


@given(st.integers())
def test_the_seed_orders_the_wounds_and_none_is_left_out(seed: int) -> None:
    wounds = possible({"decode"}, {"kill", "stop"})
    order = endless(wounds, seed)
    rounds = [[next(order) for _ in wounds] for _ in range(2)]
    assert all(sorted(w.name for w in each) == sorted(w.name for w in wounds) for each in rounds)
    again = endless(wounds, seed)
    assert [next(again) for _ in wounds] == rounds[0]


def test_only_who_is_ready_is_struck() -> None:
    starting = replace(CALM, replicas=(replace(DECODE, phase="starting"),))
    chance = random.Random(0)
    busy = replace(DECODE, replica="m/decode/3", num_running=1)
    assert victims(KILL.wound, replace(CALM, replicas=(DECODE, busy)), "m", chance) == ["m/decode/3", "m/decode/1"]
    assert victims(KILL.wound, starting, "m", chance) == victims(KILL.wound, CALM, "other", chance) == []


@given(st.integers(0, 9), st.integers(0, 5), st.integers(0, 5))
def test_what_was_lent_and_is_not_back_is_named(used: int, leases: int, promises: int) -> None:
    now = replace(CALM, replicas=(replace(DECODE, free_blocks=9 - used, num_leases=leases),), num_promises=promises)
    objection = held(now, "m").objection(held(CALM, "m"))
    assert bool(objection) == bool(used or leases or promises)
    for count, what in ((used, "KV blocks"), (leases, "leases"), (promises, "promises")):
        assert (f"{count} {what}" in objection) == bool(count)


def test_other_models_may_come_and_go() -> None:
    other = replace(DECODE, model="other", free_blocks=1)
    assert held(CALM, "m").objection(held(replace(CALM, replicas=(DECODE, other)), "m")) == ""
    assert held(replace(CALM, replicas=(DECODE, other)), "m").objection(held(CALM, "m")) == ""
