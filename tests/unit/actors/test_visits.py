"""What an API process has booked, or polls for, ends with its connection: over a real loopback connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from ernie_cluster.actors.direct import Address, DirectPeer, DirectServer
from ernie_cluster.actors.events import EventHub
from ernie_cluster.actors.messages import Ended
from ernie_cluster.actors.visits import Bookings, Pollers, Visits


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 30))


class Desk:
    """Played router: books under keys, when its gate is open."""

    def __init__(self) -> None:
        self.booked: set[str] = set()
        self.let_go = asyncio.Queue[str]()
        self.gate = asyncio.Event()
        self.asked = asyncio.Queue[str]()
        self.gate.set()

    async def acquire(self, key: str) -> None:
        self.asked.put_nowait(key)
        await self.gate.wait()
        self.booked.add(key)

    async def acquire_encoder(self, key: str) -> None:
        await self.acquire(key)

    async def release(self, model: str, attempts: Sequence[Ended]) -> None:
        self.booked -= {ended.key for ended in attempts}

    def abandoned(self, key: str) -> None:
        self.booked.discard(key)
        self.let_go.put_nowait(key)


@asynccontextmanager
async def router() -> AsyncIterator[tuple[Desk, Address]]:
    desk = Desk()
    methods = {call.__name__: call for call in (desk.acquire, desk.acquire_encoder, desk.release)}
    server = DirectServer(methods, Bookings(methods, desk.abandoned).visit)
    try:
        yield desk, await server.start("127.0.0.1")
    finally:
        await server.close()


def test_what_a_process_has_booked_is_let_go_when_it_is_gone_and_no_one_elses() -> None:
    async def work() -> None:
        async with router() as (desk, address):
            gone, stays = [await DirectPeer.connect(address, "router") for _ in range(2)]
            await gone.call("acquire", "a")
            await gone.call("acquire_encoder", "b")
            await gone.call("acquire", "c")
            await stays.call("acquire", "d")
            await gone.call("release", "tiny", [Ended("c")])
            await gone.close()
            assert {await desk.let_go.get(), await desk.let_go.get()} == {"a", "b"}
            assert desk.booked == {"d"}
            await stays.close()
            assert await desk.let_go.get() == "d"
            assert desk.let_go.empty()

    run(work())


def test_what_was_booked_again_over_another_connection_is_kept() -> None:
    async def work() -> None:
        async with router() as (desk, address):
            old, new = [await DirectPeer.connect(address, "router") for _ in range(2)]
            await old.call("acquire", "other")
            await old.call("acquire", "a")
            await new.call("acquire", "a")
            await old.close()
            assert await desk.let_go.get() == "other"
            assert desk.let_go.empty()
            assert desk.booked == {"a"}
            await new.close()

    run(work())


@pytest.mark.parametrize("is_gone", [False, True])
def test_a_booking_that_comes_after_its_release_or_the_end_of_its_process_is_undone(is_gone: bool) -> None:
    async def work() -> None:
        async with router() as (desk, address):
            desk.gate.clear()
            peer = await DirectPeer.connect(address, "router")
            call = asyncio.ensure_future(peer.call("acquire", "a"))
            await desk.asked.get()
            if is_gone:
                await peer.close()
                assert await desk.let_go.get() == "a"
            else:
                await peer.call("release", "tiny", [Ended("a")])
            desk.gate.set()
            assert await desk.let_go.get() == "a"
            assert not desk.booked
            await asyncio.gather(call, return_exceptions=True)
            await peer.close()

    run(work())


def test_what_is_kept_after_the_end_of_a_connection_is_kept_for_nobody() -> None:
    """Calls that were read begin a moment later than the end of what follows them is seen."""
    abandoned = list[str]()
    visits = Visits(abandoned.append)
    with visits.visit() as keep:
        keep("a")
    keep("b")
    assert abandoned == ["a"]
    assert "a" not in visits
    assert "b" not in visits


def test_a_client_whose_connection_has_ended_is_given_up_at_the_next_look_and_one_that_came_back_is_not() -> None:
    async def work() -> None:
        hub, left = EventHub(lambda: 0.0, 0.001), asyncio.Queue[str]()

        def abandoned(client_id: str) -> None:
            hub.left(client_id)
            left.put_nowait(client_id)

        methods = {"poll": hub.poll}
        server = DirectServer(methods, Pollers(methods, abandoned).visit)
        address = await server.start("127.0.0.1")
        first, second = [await DirectPeer.connect(address, "replica") for _ in range(2)]
        for client_id in ("gone", "back", "moved"):
            await first.call("poll", client_id, 0)
            hub.open(client_id, f"{client_id}#0")
        await second.call("poll", "moved", 0)
        await first.close()
        assert {await left.get(), await left.get()} == {"gone", "back"}
        await second.call("poll", "back", 0)
        assert hub.drop_silent() == ["gone#0"]
        assert sorted(hub.live_requests()) == ["back#0", "moved#0"]
        await second.close()
        await server.close()

    run(work())
