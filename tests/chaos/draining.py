"""A blow to a replica that is being drained, and has something to do."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import cast

from ernie_cluster.api.operator import Order
from ernie_cluster.chaos.blows import AtPoint, Hit, Scene
from ernie_cluster.chaos.stages import Stage, Wound, victims
from ernie_cluster.cli.operate import Cluster
from ernie_cluster.errors import ErnieClusterError


@dataclass(frozen=True)
class WhileDraining:
    """Strikes what the replica still has to do, whose steps are made to last for that; who lives on takes work again."""

    wound: Wound

    @property
    def name(self) -> str:
        return f"{self.wound.name}, draining"

    async def strike(self, scene: Scene) -> Hit | None:
        hit: Hit | None = None
        for chosen in victims(self.wound, scene.view, scene.model, scene.chance):
            slow = await AtPoint(self._slow).on(chosen, scene)
            if slow is None or not slow.did_strike:
                continue
            await self._order(scene, chosen, "drain")
            hit = await AtPoint(self.wound).on(chosen, scene)
            await self._order(scene, chosen, "undrain")
            if hit is None or hit.did_strike:
                break
        return hit

    @property
    def _slow(self) -> Wound:
        role = self.wound.stage.role
        return Wound(Stage(role, "a step", f"{role}.step"), "delay")

    async def _order(self, scene: Scene, replica: str, action: str) -> None:
        order = Order(replica, action)  # type: ignore[arg-type]
        with contextlib.suppress(ErnieClusterError):  # it may be dead by now
            await asyncio.to_thread(cast(Cluster, scene.operator).order, order)
