"""What an experiment strikes with: a `Blow` finds its victim, strikes, and says whether it has met."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ernie_cluster.api.operator import ClusterView, FaultsView
from ernie_cluster.chaos.stages import Wound, victims
from ernie_cluster.errors import ErnieClusterError
from ernie_cluster.faults import FaultOrder

_LOOK_S = 0.1
STRIKE_S = 15.0
"""A fault that nothing has met by then is over."""


class Operator(Protocol):
    """The system as its operator knows it. Called on threads; errors are of our tree."""

    def view(self) -> ClusterView: ...

    def faults(self, order: FaultOrder) -> FaultsView: ...


@dataclass(frozen=True, slots=True)
class Scene:
    """Where a blow falls."""

    operator: Operator
    model: str
    """Served name."""
    view: ClusterView
    """A moment ago."""
    chance: random.Random
    say: Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Hit:
    """What a blow came to."""

    victim: str
    did_strike: bool
    """False where nothing came by in time."""
    is_dead: bool
    """Whether the victim, if it is a replica, has to leave the operator's view."""


class Blow(Protocol):
    """One fault."""

    @property
    def name(self) -> str: ...

    async def strike(self, scene: Scene) -> Hit | None:
        """Strike; None when there is nobody to be struck now."""
        ...


@dataclass(frozen=True, slots=True)
class AtPoint:
    """A blow by a fail point of the victim: it strikes in the middle of its work."""

    wound: Wound

    @property
    def name(self) -> str:
        return self.wound.name

    async def strike(self, scene: Scene) -> Hit | None:
        """One after another is tried, as work may go past a replica."""
        hit: Hit | None = None
        for chosen in victims(self.wound, scene.view, scene.model, scene.chance):
            hit = await self.on(chosen, scene)
            if hit is None or hit.did_strike:
                break
        return hit

    async def on(self, chosen: str, scene: Scene) -> Hit | None:
        """Strike this one; None when it cannot be told now."""
        rule = self.wound.rule(chosen)
        try:
            await asyncio.to_thread(scene.operator.faults, FaultOrder("add", rule, STRIKE_S))
        except ErnieClusterError as e:
            scene.say(f"{self.name}: cannot be set now: {e}")
            return None
        deadline_s = time.monotonic() + STRIKE_S
        while time.monotonic() < deadline_s:
            await asyncio.sleep(_LOOK_S)
            try:
                told = await asyncio.to_thread(scene.operator.faults, FaultOrder("list"))
            except ErnieClusterError:
                continue  # the router may be the victim
            mine = [f for f in told.faults if f.fault == rule]
            if not mine or any(f.num_struck for f in mine):  # who is dead or stands still does not tell
                return Hit(chosen, True, self.wound.action == "kill")
        return Hit(chosen, False, False)
