"""The bounded threads before the engine."""

from __future__ import annotations

import asyncio
import threading

import pytest

from ernie_cluster.api.workers import Workers
from ernie_cluster.errors import Overloaded

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]


async def test_a_full_queue_refuses_and_recovers() -> None:
    gate, workers = threading.Event(), Workers(1, 2)
    busy = [asyncio.create_task(workers.run(gate.wait)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="limit is 2"):
        await workers.run(lambda: 1)
    gate.set()
    assert await asyncio.gather(*busy) == [True, True]
    assert await workers.run(lambda: 1) == 1
    workers.close()


async def test_nothing_is_kept_of_finished_work() -> None:
    workers = Workers(1, 1)
    result = await workers.run(lambda: bytearray(1))
    assert workers._jobs == set()
    assert result == b"\0"
    workers.close()


async def test_work_of_a_cancelled_caller_is_dropped() -> None:
    gate, workers, done = threading.Event(), Workers(1, 8), list[str]()
    first = asyncio.create_task(workers.run(gate.wait))
    left = asyncio.create_task(workers.run(lambda: done.append("left")))
    await asyncio.sleep(0)
    left.cancel()
    await asyncio.gather(left, return_exceptions=True)
    gate.set()
    await first
    await workers.run(lambda: done.append("stayed"))
    assert done == ["stayed"]
    workers.close()


async def test_the_loop_goes_on_while_a_thread_works() -> None:
    gate, workers = threading.Event(), Workers(1, 1)
    job = asyncio.create_task(workers.run(gate.wait))
    await asyncio.sleep(0)
    gate.set()  # only a free loop comes here
    assert await job
    workers.close()


async def test_texts_do_not_wait_for_pictures() -> None:
    gate, workers = threading.Event(), Workers(1, 16, num_media_threads=2)
    giants = [asyncio.create_task(workers.run(gate.wait, has_media=True)) for _ in range(8)]
    await asyncio.sleep(0)
    async with asyncio.timeout(30):
        assert await workers.run(lambda: "text") == "text"
    gate.set()
    assert await asyncio.gather(*giants) == [True] * 8
    workers.close()
