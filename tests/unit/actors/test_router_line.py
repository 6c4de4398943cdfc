"""The router is sought while everything else goes on: Ray's head, which knows where it is, may be away."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace

import pytest

from ernie_cluster.actors import links
from ernie_cluster.actors.direct import Address, DirectServer
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.presets import tiny


def test_streams_go_on_while_the_router_is_sought(monkeypatch: pytest.MonkeyPatch) -> None:
    is_sought, is_back = threading.Event(), threading.Event()
    went_on: list[bool] = []

    async def scene() -> None:
        async def status() -> str:
            return "fine"

        server = DirectServer({"status": status})
        address = await server.start("127.0.0.1")

        async def where() -> Address:
            return address

        def seek(app: str, config: ClusterConfig) -> object:
            is_sought.set()
            went_on.append(is_back.wait(5))
            return SimpleNamespace(address=SimpleNamespace(remote=where))

        monkeypatch.setattr(links, "find_router", seek)
        line = links.router_line("app", tiny("/m"))
        asking = asyncio.create_task(line.call("status"))
        while not is_sought.is_set():  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        is_back.set()
        assert await asking == "fine"
        await line.close()
        await server.close()

    asyncio.run(asyncio.wait_for(scene(), 30))
    assert went_on == [True]
