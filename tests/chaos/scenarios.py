"""What is struck, how, and at which stage: single faults, and two at once in different pools."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from ernie_cluster.chaos.blows import AtPoint, Blow
from ernie_cluster.chaos.stages import STAGES, Stage, Wound
from ernie_cluster.config.faults import Action
from tests.chaos.draining import WhileDraining
from tests.chaos.hanging import HungStep, Standstill
from tests.chaos.processes import TITLES, Signal


@dataclass(frozen=True)
class Scenario:
    """One volley, and what may happen beside."""

    blows: tuple[Blow, ...]
    may_break: bool = False
    """Connections may break, for an API process is the victim; clients make them again."""

    @property
    def name(self) -> str:
        return " and ".join(blow.name for blow in self.blows)


def stage_of(role: str, name: str) -> Stage:
    (found,) = (s for s in STAGES if (s.role, s.name) == (role, name))
    return found


def at(action: Action, role: str, stage: str) -> AtPoint:
    return AtPoint(Wound(stage_of(role, stage), action))


_BY_POINT = [
    Scenario((AtPoint(Wound(stage, action)),))
    for stage in STAGES
    if stage.role not in ("mixed", "api")
    for action in ("kill", "stop")
]
_BY_SIGNAL = [
    Scenario((Signal(kind, number),), may_break=kind == "API process")
    for kind in TITLES
    if kind != "router"
    for number in (signal.SIGKILL, signal.SIGSTOP)
]
_DOUBLE = [
    Scenario((at("kill", "prefill", "mid-prefill"), at("kill", "decode", "mid-decode"))),
    Scenario((at("kill", "vision", "mid-encode"), at("kill", "decode", "mid-decode"))),
    Scenario((at("kill", "prefill", "mid-transfer"), at("kill", "router", "before"))),
    Scenario((at("kill", "decode", "mid-transfer"), at("stop", "prefill", "mid-transfer"))),
    Scenario((at("stop", "decode", "mid-decode"), at("kill", "vision", "mid-transfer"))),
    Scenario((Signal("controller of Serve", signal.SIGKILL), at("kill", "decode", "mid-decode"))),
]
_SUBTLE = [
    Scenario((at(action, role, stage),))
    for action, role, stage in (
        ("corrupt", "prefill", "mid-transfer"),
        ("corrupt", "vision", "mid-transfer"),
        ("drop", "prefill", "mid-transfer"),
        ("drop", "prefill", "hand-over"),
        ("error", "prefill", "hand-over"),
        ("delay", "prefill", "mid-transfer"),
        ("delay", "decode", "mid-decode"),
        ("drop", "decode", "before"),
        ("error", "router", "before"),
    )
]
_DRAINING = [
    Scenario((WhileDraining(at(action, role, stage).wound),))
    for action in ("kill", "stop")
    for role, stage in (("decode", "mid-decode"), ("prefill", "hand-over"))
]

_HANGING = [
    Scenario((HungStep(Standstill(stage_of(role, stage), "delay")),))
    for role, stage in (("vision", "mid-encode"), ("prefill", "mid-prefill"), ("decode", "mid-decode"))
]

SCENARIOS = [*_BY_POINT, *_BY_SIGNAL, *_SUBTLE, *_DOUBLE, *_DRAINING, *_HANGING]
