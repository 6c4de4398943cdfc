"""Pictures and the vision replicas that are asked for them; the replicas are played."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from ernie_cluster.actors.errands import Errand
from ernie_cluster.actors.messages import EncodeReport, EncodeTask
from ernie_cluster.errors import EngineFailed, Overloaded, ReplicaLost
from ernie_cluster.transport.choose import Endpoint

TASK = EncodeTask("a#0", 0, {}, Endpoint("here", None, "prefill"))
REPORT = EncodeReport(())


class Vision:
    """Played: a `Link` to a vision replica that ends its work when it is told how."""

    def __init__(self, name: str) -> None:
        self.info = self
        self.replica_id = name
        self.has_begun = asyncio.Event()
        self.end: asyncio.Future[EncodeReport] = asyncio.get_running_loop().create_future()
        self.aborted: list[str] = []
        self.watched = 0

    def subscribe(self, key: str, queue: None) -> None:
        self.watched += 1

    def unsubscribe(self, key: str) -> None:
        self.watched -= 1

    async def work(self, method: str, task: EncodeTask) -> EncodeReport:
        assert (method, task, self.watched) == ("encode", TASK, 1)
        self.has_begun.set()
        return await self.end

    async def call(self, method: str, keys: list[str]) -> None:
        assert method == "abort"
        self.aborted += keys


class Scene:
    """Two vision replicas; the second is free unless it is `full`."""

    def __init__(self, hedge_s: float | None, *, is_full: bool = False) -> None:
        self.first, self.second, self.is_full = Vision("vision-0"), Vision("vision-1"), is_full
        self.later: list[asyncio.Task[None]] = []
        self.errand = Errand(TASK, self.first, self._later)  # type: ignore[arg-type]
        self.running = asyncio.create_task(self.errand.run(hedge_s, self._another))  # type: ignore[arg-type]

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        self.later.append(asyncio.create_task(work))

    async def _another(self) -> Vision:
        if self.is_full:
            raise Overloaded("nobody has room")
        return self.second

    async def result(self) -> tuple[str, EncodeReport] | None:
        async with asyncio.timeout(10):
            done = await self.running
            await asyncio.gather(*self.later)
        assert self.first.watched == self.second.watched == 0
        return done


def play(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 30))


def test_who_is_in_time_is_the_only_one() -> None:
    async def test() -> None:
        scene = Scene(60.0)
        scene.first.end.set_result(REPORT)
        assert await scene.result() == ("vision-0", REPORT)
        assert not scene.second.has_begun.is_set()
        assert (scene.first.aborted, scene.errand.failures) == ([], [])

    play(test())


@pytest.mark.parametrize("winner", [0, 1])
def test_who_is_late_gets_company_and_whoever_is_ready_first_counts(winner: int) -> None:
    async def test() -> None:
        scene = Scene(0.0)
        await scene.second.has_begun.wait()
        both = (scene.first, scene.second)
        both[winner].end.set_result(REPORT)
        assert await scene.result() == (f"vision-{winner}", REPORT)
        assert [v.aborted for v in both] == [[] if i == winner else ["a#0"] for i in range(2)]

    play(test())


def test_a_failure_is_made_good_elsewhere_at_once_and_told() -> None:
    async def test() -> None:
        scene = Scene(60.0)
        scene.first.end.set_exception(ReplicaLost("gone"))
        await scene.second.has_begun.wait()
        scene.second.end.set_result(REPORT)
        assert await scene.result() == ("vision-1", REPORT)
        assert [f.replica_id for f in scene.errand.failures] == ["vision-0"]

    play(test())


def test_two_failures_are_the_end_and_the_first_is_told_first() -> None:
    async def test() -> None:
        scene = Scene(0.0)
        await scene.second.has_begun.wait()
        scene.first.end.set_exception(EngineFailed("broken"))
        scene.second.end.set_exception(ReplicaLost("gone"))
        assert await scene.result() is None
        assert [f.replica_id for f in scene.errand.failures] == ["vision-0", "vision-1"]

    play(test())


@pytest.mark.parametrize(("hedge_s", "is_full"), [(None, False), (0.0, True)])
def test_without_a_second_one_the_first_is_waited_for(hedge_s: float | None, is_full: bool) -> None:
    async def test() -> None:
        scene = Scene(hedge_s, is_full=is_full)
        await scene.first.has_begun.wait()
        for _ in range(5):
            await asyncio.sleep(0)
        assert not scene.running.done()
        scene.first.end.set_result(REPORT)
        assert await scene.result() == ("vision-0", REPORT)
        assert not scene.second.has_begun.is_set()

    play(test())


def test_when_nobody_waits_any_more_both_are_aborted() -> None:
    async def test() -> None:
        scene = Scene(0.0)
        await scene.second.has_begun.wait()
        scene.running.cancel()
        await asyncio.wait({scene.running})
        await asyncio.sleep(0)
        await asyncio.gather(*scene.later)
        assert (scene.first.aborted, scene.second.aborted) == (["a#0"], ["a#0"])

    play(test())
