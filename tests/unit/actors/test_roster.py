"""What the router knows of replicas, and tells them, over real connections to played ranks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from ernie_cluster.actors.direct import DirectServer
from ernie_cluster.actors.messages import Load, ReplicaInfo, Told
from ernie_cluster.actors.roster import Roster
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.deployment import ModelDeployment
from ernie_cluster.config.pool import PoolConfig, Role
from ernie_cluster.config.router import RouterConfig
from ernie_cluster.deltas import Delta
from ernie_cluster.errors import OrderRefused, ReplicaLost
from ernie_cluster.policy.books import Books
from ernie_cluster.policy.scaling.plan import Gang
from ernie_cluster.transport.choose import Endpoint

POOLS = (PoolConfig("prefill"), PoolConfig("decode", dp=2))
CONFIG = ClusterConfig(
    (ModelDeployment("m", "/nowhere", POOLS, switch_roles=True),),
    router=RouterConfig(snapshot_interval_s=0.001, heartbeat_timeout_s=20.0),
)
GANG = "m/prefill/a"


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


async def until(claim: Callable[[], object]) -> None:
    while not claim():  # noqa: ASYNC110  sockets say so
        await asyncio.sleep(0)


class Rank:
    """Played: tells its load whenever that changes, and does as it is told unless it `refuses`."""

    def __init__(self, role: Role) -> None:
        self.load = Load(0, 0, 0, total_blocks=10, free_blocks=10, role=role)
        self.orders: list[object] = []
        self.refuses = False
        self.forgets = False
        """It hears orders and does nothing."""
        self._news = asyncio.Event()
        self._news.set()

    def show(self, **fields: object) -> None:
        self.load = replace(self.load, **fields)  # type: ignore[arg-type]
        self._news.set()

    async def hears_again(self) -> None:
        """It tells something, and is told something."""
        heard = len(self.orders)
        self.show(num_running=heard)
        await until(lambda: len(self.orders) > heard)

    async def tell(self, seen: int | None) -> Told:
        await self._news.wait()
        self._news.clear()
        return Told(self.load, Delta(seen, seen or 0), 0.0)

    async def become(self, role: Role) -> None:
        self.orders.append(role)
        if self.refuses:
            raise OrderRefused(f"not {role}", param="role")
        if not self.forgets:
            self.show(role=role)

    async def drain(self, is_draining: bool, within_s: float | None) -> None:
        self.orders.append(is_draining)
        if self.refuses:
            raise OrderRefused("it leaves")
        if not self.forgets:
            self.show(is_draining=is_draining, within_s=within_s)


class Scene:
    """A roster, and ranks that have registered there."""

    def __init__(self) -> None:
        self.books = Books(CONFIG.router.heartbeat_timeout_s)
        self.roster = Roster(self.books, CONFIG)
        self.servers: list[DirectServer] = []

    async def rank(self, gang: str = GANG, lane: str = "", life: str = "life") -> tuple[Rank, ReplicaInfo]:
        """Another one, which the roster does not know."""
        model, role, _ = gang.split("/")
        rank = Rank(role)  # type: ignore[arg-type]
        server = DirectServer({call.__name__: call for call in (rank.tell, rank.become, rank.drain)})
        self.servers.append(server)
        address = await server.start("127.0.0.1")
        info = ReplicaInfo(
            gang + lane, gang, life, model, role, "node", "actor", address, Endpoint("host", None, "actor")  # type: ignore[arg-type]
        )  # fmt: skip
        return rank, info

    async def there(self, gang: str = GANG, lane: str = "") -> tuple[Rank, ReplicaInfo]:
        """Another one, which has told of itself."""
        rank, info = await self.rank(gang, lane)
        self.roster.register(info)
        await until(lambda: info.replica_id in {i.replica_id for i, _ in self.roster.loads(gang)})
        return rank, info

    def gang(self, gang_id: str = GANG) -> Gang:
        return next(g for g in self.roster.gangs() if g.gang_id == gang_id)

    def booked(self) -> tuple[Role, bool]:
        """Role and draining of the only replica, as routes are sought."""
        (snapshot,) = self.books.view(0.0)
        return snapshot.role, snapshot.is_draining


@asynccontextmanager
async def scene() -> AsyncIterator[Scene]:
    made = Scene()
    try:
        yield made
    finally:
        for replica_id in list(made.roster.infos):
            made.roster.forget(replica_id)
        for server in made.servers:
            await server.close()


def test_what_is_told_counts_at_once_and_stays() -> None:
    async def play() -> None:
        async with scene() as s:
            rank, _ = await s.there()
            assert s.booked() == ("prefill", False)
            telling = asyncio.create_task(s.roster.tell(GANG, role="decode", is_draining=True))
            await until(lambda: s.booked() == ("decode", True))
            assert (s.gang().home, s.gang().role, s.gang().is_draining) == ("prefill", "decode", True)
            await telling
            await until(lambda: (rank.load.role, rank.load.is_draining) == ("decode", True))
            await s.roster.tell(GANG, is_draining=False)
            assert s.booked() == ("decode", False)

    run(play())


def test_an_order_is_repeated_until_it_shows() -> None:
    async def play() -> None:
        async with scene() as s:
            rank, _ = await s.there()
            rank.forgets = True
            await s.roster.tell(GANG, is_draining=True)
            for _ in range(2):
                await rank.hears_again()
            rank.forgets = False
            rank.show(num_running=0)
            await until(lambda: s.roster.is_done(GANG))
            heard = len(rank.orders)
            rank.show(waiting_tokens=7)
            await until(lambda: s.gang().load == 7)
            assert set(rank.orders) == {True}
            assert len(rank.orders) == heard

    run(play())


def test_a_refusal_is_told_as_it_is_and_changes_nothing() -> None:
    async def play() -> None:
        async with scene() as s:
            rank, info = await s.there()
            rank.refuses = True
            with pytest.raises(OrderRefused, match="not decode"):
                await s.roster.tell(GANG, role="decode")
            assert s.booked() == ("prefill", False)
            heard = len(rank.orders)
            rank.show(waiting_tokens=7)
            await until(lambda: s.gang().load == 7)
            assert len(rank.orders) == heard, "it has said no"
            assert info.replica_id in s.roster.infos

    run(play())


def test_a_replica_of_two_lanes_is_done_when_both_have_said_so() -> None:
    async def play() -> None:
        async with scene() as s:
            gang = "m/decode/a"
            one, _ = await s.there(gang, "/0")
            await s.roster.tell(gang, is_draining=True)
            await until(lambda: one.load.is_draining)
            one.show(num_running=1)
            await until(lambda: s.gang(gang).load == 0 and s.roster.loads(gang)[0][1].num_running)
            one.show(num_running=0)
            await until(lambda: s.roster.loads(gang)[0][1].is_idle)
            assert not s.roster.is_done(gang), "nobody knows what the other one does"
            other, info = await s.rank(gang, "/1")
            other.show(num_running=3)
            s.roster.register(info)
            await until(lambda: other.orders == [True])  # what the gang was told, it is told, too
            assert not s.roster.is_done(gang)
            other.show(num_running=0)
            await until(lambda: s.roster.is_done(gang))

    run(play())


def test_who_comes_back_is_what_it_says_itself() -> None:
    async def play() -> None:
        async with scene() as s:
            rank, info = await s.there()
            await s.roster.tell(GANG, role="decode")
            s.roster.forget(info.replica_id)
            assert not s.roster.gangs()
            assert not s.books.view(0.0)
            with pytest.raises(ReplicaLost, match="not told of itself"):
                await s.roster.tell(GANG, is_draining=True)
            rank.show(num_running=1)
            s.roster.register(info)
            await until(s.roster.gangs)
            assert (s.gang().role, s.gang().is_draining) == ("decode", False)

    run(play())


def test_a_suspect_stays_and_is_cleared_by_what_it_tells_next() -> None:
    async def play() -> None:
        async with scene() as s:
            rank, info = await s.there()
            s.roster.suspect(info.replica_id)
            assert s.books.suspects(0.0) == {info.replica_id}
            assert s.booked() == ("prefill", False), "it may be all there is"
            rank.show(num_running=1)
            await until(lambda: not s.books.suspects(0.0))

    run(play())


def test_a_dead_replica_is_forgotten_and_another_life_of_it_begins_anew() -> None:
    async def play() -> None:
        async with scene() as s:
            rank, info = await s.there()
            rank.forgets = True
            await s.roster.tell(GANG, is_draining=True)
            await s.servers[0].close()
            await until(lambda: not s.roster.infos)
            _, again = await s.rank(life="another")
            s.roster.register(again)
            s.roster.register(again)  # as every second
            await until(s.roster.gangs)
            assert s.booked() == ("prefill", False)
            assert s.roster.infos == {info.replica_id: again}

    run(play())


def test_a_shorter_time_is_told_and_a_longer_one_changes_nothing() -> None:
    async def play() -> None:
        async with scene() as s:
            rank, _ = await s.there()
            for within_s, shown_s in ((60.0, 60.0), (5.0, 5.0), (600.0, 5.0)):
                await s.roster.tell(GANG, is_draining=True, within_s=within_s)
                rank.show(waiting_tokens=int(within_s))
                await until(lambda within_s=within_s: s.gang().load == within_s)  # type: ignore[misc]
                assert (rank.load.is_draining, rank.load.within_s) == (True, shown_s)

    run(play())


def test_one_that_leaves_does_not_stay_and_is_not_asked_again() -> None:
    async def play() -> None:
        async with scene() as s:
            rank, _ = await s.there()
            rank.show(is_draining=True, within_s=0.0)
            await until(lambda: s.booked() == ("prefill", True))
            rank.refuses = True
            with pytest.raises(OrderRefused, match="it leaves"):
                await s.roster.tell(GANG, is_draining=False)
            assert s.booked() == ("prefill", True)
            heard = len(rank.orders)
            rank.show(waiting_tokens=7)
            await until(lambda: s.gang().load == 7)
            assert len(rank.orders) == heard

    run(play())


def test_one_that_took_work_again_and_then_leaves_is_believed_at_once() -> None:
    async def play() -> None:
        async with scene() as s:
            rank, _ = await s.there()
            for is_draining in (True, False):
                await s.roster.tell(GANG, is_draining=is_draining)
            rank.refuses = True
            booked = s.booked
            seen: list[object] = []
            s.roster._book, book = lambda gang: (book(gang), seen.append(booked())), s.roster._book  # type: ignore[method-assign]
            rank.show(is_draining=True, within_s=0.25)
            await until(lambda: bool(seen))
            assert seen == [("prefill", True)]

    run(play())


def test_of_two_versions_the_wanted_one_takes_over_when_it_is_whole() -> None:
    wanted = CONFIG.model("m").version

    async def play() -> None:
        async with scene() as s:
            for version in ("old", wanted):
                for role in ("prefill", "decode"):
                    _, info = await s.rank(f"m/{role}/{version}")
                    s.roster.register(replace(info, version=version))
                    await until(lambda info=info: s.roster.loads(info.gang))  # type: ignore[misc]
                    usable = {r.replica_id.rpartition("/")[2] for r in s.books.view(0.0) if r.is_usable}
                    is_over = (version, role) == (wanted, "decode")
                    if (version, role) != ("old", "prefill"):
                        assert usable == {wanted if is_over else "old"}
            assert s.roster.roles("m") == {"prefill", "decode"}
            s.roster.forget(f"m/decode/{wanted}")
            assert {r.replica_id for r in s.books.view(0.0) if r.is_usable} == {"m/prefill/old", "m/decode/old"}

    run(play())


def test_what_is_configured_no_more_is_not_taken_in() -> None:
    async def play() -> None:
        async with scene() as s:
            for gang in ("gone/prefill/a", "m/mixed/a"):
                _, info = await s.rank(gang)
                s.roster.register(info)
            assert not s.roster.infos

    run(play())
