"""A blow to a replica that is just being drained."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import cast

from ernie_cluster.api.operator import Order
from ernie_cluster.chaos.blows import AtPoint, Hit, Scene
from ernie_cluster.chaos.stages import Wound, victims
from ernie_cluster.cli.operate import Cluster
from ernie_cluster.errors import ErnieClusterError


@dataclass(frozen=True)
class WhileDraining:
    """Strikes what the replica still has to do; who lives on takes work again."""

    wound: Wound

    @property
    def name(self) -> str:
        return f"{self.wound.name}, draining"

    async def strike(self, scene: Scene) -> Hit | None:
        hit: Hit | None = None
        for chosen in victims(self.wound, scene.view, scene.model, scene.chance):
            struck = asyncio.create_task(AtPoint(self.wound).on(chosen, scene))
            await self._order(scene, chosen, "drain")
            hit = await struck
            await self._order(scene, chosen, "undrain")
            if hit is None or hit.did_strike:
                break
        return hit

    async def _order(self, scene: Scene, replica: str, action: str) -> None:
        order = Order(replica, action)  # type: ignore[arg-type]
        with contextlib.suppress(ErnieClusterError):  # it may be dead by now
            await asyncio.to_thread(cast(Cluster, scene.operator).order, order)
