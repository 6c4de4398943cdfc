"""What comes out of calls, in words of our own; and how a replica is noticed that answers nothing any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, TaskCancelledError

from ernie_cluster.actors.direct import DirectPeer, DirectServer, RemoteFailure
from ernie_cluster.actors.links import Link, WatchedLine, failure_of, translate
from ernie_cluster.actors.merge import Failure, News
from ernie_cluster.actors.messages import Batch, ReplicaInfo
from ernie_cluster.actors.patience import answered
from ernie_cluster.errors import (
    ContextTooLong,
    EngineFailed,
    ErnieClusterError,
    Overloaded,
    ReplicaDraining,
    ReplicaLost,
)
from ernie_cluster.request import TokenEvent
from ernie_cluster.transport.choose import Endpoint


def told(cause: ErnieClusterError) -> RemoteFailure:
    return RemoteFailure(cause)


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (told(ContextTooLong("too long")), ContextTooLong, "too long"),
        (told(Overloaded("full", 3.0)), Overloaded, "full"),
        (Overloaded("full"), Overloaded, "full"),
        (RayActorError(), ReplicaLost, "decode-0 is gone"),
        (ActorDiedError(), ReplicaLost, "decode-0 is gone"),
        (ActorUnavailableError("restarting", b"0" * 16), ReplicaLost, "decode-0 is gone"),
        (TimeoutError(), ReplicaLost, "decode-0 does not answer"),
        (TaskCancelledError(), EngineFailed, "decode-0: TaskCancelledError"),
        (RuntimeError("odd"), EngineFailed, "decode-0: RuntimeError: odd"),
    ],
)
def test_translate(error: Exception, kind: type[Exception], text: str) -> None:
    translated = translate(error, "decode-0")
    assert type(translated) is kind
    assert text in str(translated)


def test_retry_time_survives() -> None:
    error = translate(told(Overloaded("full", 3.0)), "decode-0")
    assert isinstance(error, Overloaded)
    assert error.retry_after_s == 3.0


def test_failure_knows_whether_the_replica_said_it_itself() -> None:
    assert failure_of(told(EngineFailed("stopped")), "decode-0").is_told
    assert not failure_of(ActorDiedError(), "decode-0").is_told
    assert failure_of(TimeoutError(), "decode-0").culprit({"prefill-0": "decode-0"}) == "decode-0"


SOON_S = 0.2
"""After which a silent replica is taken for lost here."""


class Rank:
    """Played: answers polls with what is published, or at once with nothing, as long as it goes."""

    def __init__(self) -> None:
        self.goes = asyncio.Event()
        self.goes.set()
        self.outcomes: list[TokenEvent] = []
        self.polls: list[int] = []
        self.is_done = asyncio.Event()

    async def poll(self, client_id: str, acknowledged: int) -> Batch:
        await self.goes.wait()
        self.polls.append(acknowledged)
        batch, self.outcomes = tuple(self.outcomes), []
        return Batch(acknowledged + 1, batch)

    async def embed(self, key: str) -> str:
        await self.is_done.wait()
        return key


@asynccontextmanager
async def linked(timeout_s: float = SOON_S) -> AsyncIterator[tuple[Rank, Link]]:
    rank = Rank()
    server = DirectServer({"poll": rank.poll, "embed": rank.embed})
    address = await server.start("127.0.0.1")
    there = Endpoint("here", None, "actor")
    link = Link(ReplicaInfo("r-0", "r-0", "life", "m", "decode", "node", "actor", address, there), "me", timeout_s)
    try:
        yield rank, link
    finally:
        await link.close()
        await server.close()


def play(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 30))


def test_a_replica_that_leaves_a_poll_without_an_answer_is_lost_to_all_who_wait() -> None:
    async def test() -> None:
        async with linked() as (rank, link):
            queues: list[asyncio.Queue[News]] = [asyncio.Queue(), asyncio.Queue()]
            for i, queue in enumerate(queues):
                link.subscribe(f"a#{i}", queue)
            link.subscribe("watched", None)
            work = asyncio.create_task(link.work("embed", "x"))
            rank.goes.clear()
            for queue in queues:
                news = await queue.get()
                assert isinstance(news, Failure)
                assert (news.replica_id, type(news.error), news.is_told) == ("r-0", ReplicaLost, False)
            with pytest.raises(ReplicaLost, match="does not answer"):
                await work
            assert link.is_lost

    play(test)


def test_work_may_take_longer_than_silence_may_last() -> None:
    async def test() -> None:
        async with linked() as (rank, link):
            link.subscribe("watched", None)
            work = asyncio.create_task(link.work("embed", "x"))
            while len(rank.polls) < 2:  # noqa: ASYNC110  signs of life
                await asyncio.sleep(0)
            assert not work.done()
            rank.is_done.set()
            assert await work == "x"
            assert not link.is_lost

    play(test)


def test_whom_nobody_asks_is_not_polled_and_nothing_is_lost_when_somebody_does_again() -> None:
    async def test() -> None:
        async with linked(30.0) as (rank, link):
            for key in ("a", "b"):
                queue: asyncio.Queue[News] = asyncio.Queue()
                link.subscribe(key, queue)
                rank.outcomes.append(TokenEvent(key, 0, (1,)))
                assert await queue.get() == TokenEvent(key, 0, (1,))
                link.unsubscribe(key)
                assert link._poller is not None
                await link._poller
            assert rank.polls.count(0) == 2, "it begins anew, for it may have been forgotten"

    play(test)


def test_a_closed_link_opens_no_connection_again() -> None:
    async def test() -> None:
        async with linked() as (_, link):
            await link.close()
            with pytest.raises(ReplicaLost, match="closed"):
                await link.call("embed", "x")

    play(test)


def test_a_pause_of_our_own_is_not_theirs() -> None:
    """What has come while this process stood still is read before anybody is given up."""

    async def test() -> None:
        loop = asyncio.get_running_loop()
        asked = loop.create_future()
        start = loop.time()
        clock = loop.time
        skipped = [0.0]
        loop.time = lambda: clock() + skipped[0]  # type: ignore[method-assign]
        waiting = asyncio.create_task(answered(asyncio.wait_for(asked, None), 60.0))
        await asyncio.sleep(0)
        skipped[0] = 100.0  # all of a sudden
        loop.call_later(0.05, asked.set_result, "late")
        assert await waiting == "late"
        assert loop.time() - start > 60

    asyncio.run(test())


class Router:
    """Played: answers once it `goes`."""

    def __init__(self) -> None:
        self.goes = asyncio.Event()
        self.num_asked = 0

    async def status(self) -> str:
        self.num_asked += 1
        await self.goes.wait()
        return "well"

    async def acquire(self) -> str:
        while self.num_asked < 3:  # noqa: ASYNC110  others say so
            await asyncio.sleep(0)
        return "a path"


@pytest.mark.parametrize("hangs", [True, False])
def test_who_hangs_is_started_again_and_who_only_takes_long_is_not(hangs: bool) -> None:
    async def test() -> None:
        router, restarted = Router(), asyncio.Event()
        server = DirectServer({"status": router.status, "acquire": router.acquire})
        address = await server.start("127.0.0.1")
        line = WatchedLine(lambda: DirectPeer.connect(address, "the router"), restarted.set, 0.1)
        if not hangs:
            router.goes.set()
        call = asyncio.create_task(line.call("acquire"))
        if hangs:
            await restarted.wait()
            await server.close()
            with pytest.raises(ReplicaLost):
                await call
        else:
            assert await call == "a path"
            assert not restarted.is_set()
        await line.close()
        await server.close()

    play(test)


def test_who_is_just_being_started_does_not_hang() -> None:
    async def test() -> None:
        asked = asyncio.Event()

        async def connect() -> DirectPeer:
            asked.set()
            await asyncio.sleep(0.1)
            raise ReplicaLost("nobody is there yet")

        restarted: list[int] = []
        line = WatchedLine(connect, lambda: restarted.append(1), 0.02)
        with pytest.raises(ReplicaLost):
            await line.call("acquire")
        assert not restarted
        await line.close()

    play(test)


def test_who_parted_with_a_request_is_not_met_again_by_it() -> None:
    assert failure_of(told(ReplicaDraining("leaving")), "decode-0").culprit({}) == "decode-0"
