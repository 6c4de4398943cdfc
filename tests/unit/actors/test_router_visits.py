"""A router in this process, and API processes that are gone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import ray

from ernie_cluster.actors import process, router
from ernie_cluster.actors.direct import DirectPeer
from ernie_cluster.config.presets import tiny
from ernie_cluster.errors import ReplicaLost
from ernie_cluster.policy.snapshot import Demand


def test_who_is_gone_waits_for_no_place_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "log_lines", lambda: None)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(router, "_SETTLE_S", 1000.0)  # so that all wait
    config = tiny("/m")

    async def work() -> None:
        actor: Any = router.Router
        own = actor.__ray_metadata__.modified_class(config)
        own._touch = lambda: None
        address = await own.address()
        peers = [await DirectPeer.connect(address, "the router") for _ in range(2)]
        demand = Demand(config.models[0].name, 8, 8, timeout_s=900.0)
        calls = [
            asyncio.create_task(peer.call("acquire", key, demand, [], 30.0))
            for peer, key in zip(peers, ("a#0", "b#0"), strict=True)
        ]
        while len(own._queue) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        await peers[0].close()
        with pytest.raises(ReplicaLost):
            await calls[0]
        while len(own._queue) > 1:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        assert not calls[1].done()
        await peers[1].close()
        with pytest.raises(ReplicaLost):
            await calls[1]

    asyncio.run(asyncio.wait_for(work(), 30))
