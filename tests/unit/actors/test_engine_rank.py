"""An engine rank in this process, and API replicas that poll it no more."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from ernie_cluster.actors import engine_rank, events, upkeep
from ernie_cluster.actors.engine_rank import EngineRank
from ernie_cluster.errors import Evicted
from tests.tiny import make_request
from tests.unit.actors.test_duty import rank_of
from tests.unit.engine.toy import toy_worker


def test_requests_of_an_api_replica_that_polls_no_more_are_ended_and_those_of_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(upkeep, "SWEEP_S", 0.01)
    monkeypatch.setattr(events, "CLIENT_TIMEOUT_S", 0.3)
    monkeypatch.setattr(engine_rank, "EventHub", lambda clock, idle_s: events.EventHub(clock, 0.02))
    rank = rank_of(EngineRank, "decode", monkeypatch)
    rank._worker, _ = worker, _ = toy_worker(60, 4)
    aborted = asyncio.Queue[str]()
    abort = worker.abort

    def noted(request_id: str) -> bool:
        aborted.put_nowait(request_id)
        return abort(request_id)

    monkeypatch.setattr(worker, "abort", noted)

    async def play() -> None:
        batch = await rank.poll("gone", 0)
        await rank.open_prefill("gone", make_request(range(10, 19), "running", max_tokens=9), 0, None)
        await rank.open_decode("gone", make_request(range(10, 19), "leased", max_tokens=9), 0)
        await rank.open_prefill("here", make_request(range(20, 29), "stays", max_tokens=9), 0, None)
        worker.engine.step()
        num_used = worker.pool.num_used

        async def go_on() -> None:
            number = 0
            while True:
                number = (await rank.poll("here", number)).number

        polling = asyncio.create_task(go_on())
        assert {await aborted.get(), await aborted.get()} == {"running", "leased"}
        worker.engine.step()
        assert 0 < worker.pool.num_used < num_used
        assert rank._events().live_requests() == ["stays"]
        with pytest.raises(Evicted, match="given up"):
            await rank.poll("gone", batch.number)
        assert aborted.empty()
        for task in (polling, rank._upkeep):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    asyncio.run(asyncio.wait_for(play(), 30))
    assert worker.check()
