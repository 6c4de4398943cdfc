"""Where in its work each kind of process is hit, and which faults come one after another. Pure."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from ernie_cluster.api.operator import ClusterView
from ernie_cluster.config.faults import POINTS, Action, FaultRole, FaultRule


@dataclass(frozen=True, slots=True)
class Stage:
    """A moment in the work of a process of one kind."""

    role: FaultRole
    name: str
    point: str
    after: int = 0
    """Passes of the point before."""


STAGES = (
    Stage("vision", "before", "vision.encode"),
    Stage("vision", "mid-encode", "vision.step"),
    Stage("vision", "mid-transfer", "transport.push", 1),
    Stage("prefill", "before", "replica.open_prefill"),
    Stage("prefill", "mid-prefill", "prefill.step", 1),
    Stage("prefill", "mid-transfer", "transport.push", 1),
    Stage("prefill", "hand-over", "transport.commit"),
    Stage("decode", "before", "replica.open_decode"),
    Stage("decode", "mid-transfer", "transport.accept", 1),
    Stage("decode", "mid-decode", "decode.step", 8),
    Stage("mixed", "before", "replica.open_prefill"),
    Stage("mixed", "mid-prefill", "prefill.step", 1),
    Stage("mixed", "mid-decode", "decode.step", 8),
    Stage("router", "before", "router.acquire"),
    Stage("router", "afterwards", "router.release"),
    Stage("api", "before", "api.generate", 2),
)

SHAPES: dict[Action, dict[str, float | int | None]] = {
    "kill": {"times": 1},
    "stop": {"times": 1, "lasts_s": 4.0},
    "delay": {"times": 3, "lasts_s": 0.5},
    "error": {"times": 1},
    "drop": {"times": 1},
    "corrupt": {"probability": 0.5, "times": 2},
}
"""How each fault is made in an experiment."""


@dataclass(frozen=True, slots=True)
class Wound:
    """One fault of an experiment; whom it strikes is chosen when its time comes."""

    stage: Stage
    action: Action

    @property
    def name(self) -> str:
        return f"{self.action} {self.stage.role}, {self.stage.name}"

    def rule(self, replica: str) -> FaultRule:
        """The fault, for one process."""
        shape = SHAPES[self.action]
        after = 0 if self.action in ("corrupt", "delay") else self.stage.after
        rule = FaultRule(self.stage.point, self.action, role=self.stage.role, replica=replica, after=after)
        return replace(rule, **shape)  # type: ignore[arg-type]


def possible(roles: Collection[str], actions: Collection[str]) -> list[Wound]:
    """All that can strike processes of these kinds, by stage and action."""
    return [
        Wound(stage, action)
        for stage in STAGES
        if stage.role in roles
        for action in SHAPES
        if action in actions and action in POINTS[stage.point].actions
    ]


def endless(wounds: list[Wound], seed: int) -> Iterator[Wound]:
    """All of them in an order of chance, and again in another."""
    chance = random.Random(seed)
    while wounds:
        yield from chance.sample(wounds, len(wounds))


def victims(wound: Wound, view: ClusterView, model: str, chance: random.Random) -> list[str]:
    """Replicas that can be struck, those that are at work first; "*" for processes that are no replicas."""
    if wound.stage.role in ("router", "api"):
        return ["*"]
    ready = [r for r in view.replicas if (r.model, r.home, r.phase) == (model, wound.stage.role, "ready")]
    shuffled = chance.sample(ready, len(ready))
    return [r.replica for r in sorted(shuffled, key=lambda r: not (r.num_running or r.num_waiting))]
