"""A blow that no signal deals: the engine stands still in the middle of a step, while its process answers whoever asks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ernie_cluster.chaos.blows import AtPoint, Hit, Scene
from ernie_cluster.chaos.stages import Wound
from ernie_cluster.config.faults import FaultRule

_FOR_EVER_S = 300.0


@dataclass(frozen=True, slots=True)
class Standstill(Wound):
    """A delay that outlasts the experiment."""

    @property
    def name(self) -> str:
        return f"standstill of {self.stage.role}, {self.stage.name}"

    def rule(self, replica: str) -> FaultRule:
        rule = Wound(self.stage, "delay").rule(replica)
        return dataclasses.replace(rule, after=self.stage.after, times=1, lasts_s=_FOR_EVER_S)


@dataclass(frozen=True)
class HungStep(AtPoint):
    """Whoever hangs is to be replaced."""

    async def on(self, chosen: str, scene: Scene) -> Hit | None:
        hit = await AtPoint.on(self, chosen, scene)
        return hit and dataclasses.replace(hit, is_dead=hit.did_strike)
