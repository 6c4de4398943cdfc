"""Places are given out in turn, as the books get room; without Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import pytest

from ernie_cluster.actors.queue import Queue
from ernie_cluster.config.router import RouterConfig
from ernie_cluster.errors import Aborted, ContextTooLong, Overloaded
from ernie_cluster.policy.books import Books
from ernie_cluster.policy.breakers import Breakers
from ernie_cluster.policy.forecast import Forecasts
from ernie_cluster.policy.routing import Path
from ernie_cluster.policy.snapshot import Demand, Rates
from ernie_cluster.policy.waiting import Ticket
from tests.unit.policy.test_routing import M0

LIMITS = RouterConfig(reserve_output_tokens=32, retry_after_s=2)
WHOLE = Demand("m", 1500, 32)  # the replica has room for one of them
BATCH = replace(WHOLE, priority=1)


class Desk:
    """A queue over one replica."""

    def __init__(self, settled_s: float = 0.0, **limits: object) -> None:
        self.limits = replace(LIMITS, **limits)  # type: ignore[arg-type]
        self.books = Books(heartbeat_timeout_s=1e9)
        self.queue = Queue(self.books, self.limits, Forecasts(self.limits), Breakers(self.limits), settled_s)

    def open(self) -> None:
        self.books.report(M0, now_s=0)

    def ticket(self, key: str, demand: Demand) -> Ticket:
        return Ticket.of(key, demand, frozenset(), self.limits, time.monotonic())

    def place(self, key: str, demand: Demand = BATCH) -> Coroutine[Any, Any, Path]:
        return self.queue.place(Ticket.of(key, demand, frozenset(), self.limits, asyncio.get_running_loop().time()), 60)


async def waiting(desk: Desk, count: int) -> None:
    while len(desk.queue) != count:  # noqa: ASYNC110  others say so
        await asyncio.sleep(0)


def test_batch_work_waits_for_a_place_in_turn() -> None:
    async def run() -> None:
        desk = Desk()
        desk.open()
        await desk.place("r0")
        tasks = [asyncio.ensure_future(desk.place(f"r{i}", replace(BATCH, timeout_s=100 - i))) for i in (1, 2)]
        await waiting(desk, 2)
        with pytest.raises(Overloaded) as told:
            await desk.place("now", WHOLE)
        assert told.value.retry_after_s >= 2
        desk.books.release("r0")
        assert (await tasks[1]).prefill == "m0"  # its deadline is nearer
        assert not tasks[0].done()
        desk.books.release("r2")
        await tasks[0]
        assert len(desk.queue) == 0

    asyncio.run(run())


def test_who_is_given_up_waits_no_more() -> None:
    async def run() -> None:
        desk = Desk()
        desk.open()
        await desk.place("r0")
        task = asyncio.ensure_future(desk.place("r1"))
        await waiting(desk, 1)
        desk.queue.give_up("r1")
        desk.queue.give_up("unknown")
        with pytest.raises(Aborted):
            await task
        assert len(desk.queue) == 0
        desk.books.release("r0")
        assert (await desk.place("r2")).prefill == "m0"

    asyncio.run(run())


def test_replicas_in_turn_whatever_they_have_to_do() -> None:
    async def run() -> None:
        desk = Desk(policy="round_robin")
        for i in range(3):
            desk.books.report(replace(M0, replica_id=f"m{i}", waiting_tokens=1000 * i), now_s=0)
        one = Demand("m", 15, 1)
        assert [(await desk.place(f"r{i}", one)).prefill for i in range(6)] == ["m0", "m1", "m2"] * 2

    asyncio.run(run())


def test_waiting_ends_with_an_honest_word() -> None:
    async def run() -> None:
        desk = Desk(max_wait_s=0.03)
        desk.open()
        await desk.place("r0")
        with pytest.raises(Overloaded, match="96 blocks needed, 4 free"):
            await desk.place("r1")

    asyncio.run(run())


def test_who_cannot_make_it_is_told_at_once_and_holds_nobody_up() -> None:
    async def run() -> None:
        desk = Desk(max_wait_s=1e6)
        desk.books.report(replace(M0, rates=Rates(token_s=1.0)), now_s=0)
        await desk.place("r0")
        late = asyncio.ensure_future(
            desk.place("late", replace(BATCH, timeout_s=2999.0))
        )  # the other's 1,500 s, then its
        stays = asyncio.ensure_future(desk.place("stays", replace(BATCH, timeout_s=3100.0)))
        with pytest.raises(Overloaded) as told:
            await late
        assert told.value.retry_after_s >= 2
        assert not stays.done()
        desk.books.release("r0")
        await stays

    asyncio.run(run())


def test_a_full_room_and_what_never_fits_are_refused_at_once() -> None:
    async def run() -> None:
        desk = Desk(max_waiting=0)
        desk.open()
        await desk.place("r0")
        with pytest.raises(Overloaded):
            await desk.place("r1")
        with pytest.raises(ContextTooLong):
            await desk.place("r2", Demand("m", 10_000, 1))

    asyncio.run(run())


def test_a_router_that_has_just_started_refuses_nobody() -> None:
    async def run() -> None:
        desk = Desk(settled_s=1e12)
        task = asyncio.ensure_future(desk.place("r0", WHOLE))
        await waiting(desk, 1)
        desk.open()
        assert (await task).prefill == "m0"

    asyncio.run(run())


def test_who_knocks_is_told_what_he_would_be_told_and_takes_no_place() -> None:
    async def run() -> None:
        desk = Desk()
        desk.open()
        assert desk.queue.knock(desk.ticket("", WHOLE)) is None
        await desk.place("r0")
        refusal = desk.queue.knock(desk.ticket("", WHOLE))
        assert refusal is not None
        with pytest.raises(Overloaded) as told:
            await desk.place("r1", WHOLE)
        assert str(told.value) == refusal.reason
        assert desk.queue.knock(desk.ticket("", BATCH)) is None, "it may wait"
        desk.books.release("r0")
        assert desk.queue.knock(desk.ticket("", WHOLE)) is None
        assert desk.books.num_promises == 0

    asyncio.run(run())


def test_a_young_router_turns_nobody_away_who_knocks() -> None:
    desk = Desk(settled_s=time.monotonic() + 60)
    assert desk.queue.knock(desk.ticket("", WHOLE)) is None


def test_who_cannot_be_served_in_time_is_told_at_once_and_one_with_more_time_is_served() -> None:
    async def run() -> None:
        desk = Desk()
        desk.books.report(replace(M0, num_running=50, max_running=1), now_s=0)  # fifty answers of 32 steps of 20 ms
        for demand in (WHOLE, BATCH):
            with pytest.raises(Overloaded, match="left of its time"):
                await desk.place("r0", replace(demand, timeout_s=20))
        assert desk.books.num_promises == 0
        assert (await desk.place("r0", replace(WHOLE, timeout_s=600))).ttft_s > 20

    asyncio.run(run())
