"""The upkeep of requests goes on when a part of it has failed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable

import pytest

from ernie_cluster.actors import upkeep
from ernie_cluster.actors.events import EventHub
from ernie_cluster.actors.upkeep import Upkeep


class Worker:
    """Played; fails at first, and once more for each request that it is to end."""

    def __init__(self) -> None:
        self.tried: dict[str, int] = {}
        self.aborted = asyncio.Queue[str]()
        self.renewed = asyncio.Queue[list[str]]()
        self.num_failures = 0

    def abort(self, request_id: str) -> bool:
        self.tried[request_id] = self.tried.get(request_id, 0) + 1
        if self.tried[request_id] == 1:
            raise RuntimeError("not now")
        self.aborted.put_nowait(request_id)
        return True

    def renew(self, request_ids: Iterable[str]) -> None:
        self.num_failures += 1
        if self.num_failures == 1:
            raise RuntimeError("nor now")
        self.renewed.put_nowait(list(request_ids))

    def gone(self, request_ids: Iterable[str]) -> list[str]:
        raise RuntimeError("never")


def test_requests_of_a_client_that_is_gone_end_and_those_of_others_live_on_though_something_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(upkeep, "SWEEP_S", 0.001)

    async def work() -> None:
        hub, worker = EventHub(lambda: 0.0, 0.001), Worker()
        for client_id, request_id in (("gone", "a"), ("gone", "b"), ("here", "c")):
            hub.open(client_id, request_id)
        hub.left("gone")
        task = asyncio.create_task(Upkeep(hub, worker, ()).run())
        assert {await worker.aborted.get(), await worker.aborted.get()} == {"a", "b"}
        assert await worker.renewed.get() == ["c"]
        assert await worker.renewed.get() == ["c"]  # and again
        assert worker.aborted.empty()
        assert not task.done()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(work(), 30))
    assert "is tried again" in caplog.text
