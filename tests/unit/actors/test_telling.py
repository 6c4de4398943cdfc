"""What a rank tells the router, and when; pauses are counted, not waited for."""

from __future__ import annotations

import asyncio

import pytest

from ernie_cluster.actors import telling
from ernie_cluster.actors.messages import Load, Told
from ernie_cluster.actors.telling import Teller
from ernie_cluster.config.router import RouterConfig
from ernie_cluster.deltas import DeltaLog
from ernie_cluster.errors import EngineFailed

IDLE, BUSY = Load(0, 0, 0), Load(1, 0, 0)


class Rank:
    """A rank whose clock moves when its teller pauses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.load, self.log, self.now_s = IDLE, DeltaLog(), 0.0
        self.at: dict[float, Load] = {}
        monkeypatch.setattr(telling.time, "monotonic", lambda: self.now_s)
        monkeypatch.setattr(telling.asyncio, "sleep", self.pause)
        self.teller = Teller(
            lambda: self.load, self.log.since, RouterConfig(snapshot_interval_s=0.125, heartbeat_timeout_s=4.0)
        )

    async def pause(self, seconds: float) -> None:
        self.now_s += seconds
        self.load = self.at.get(self.now_s, self.load)

    def tell(self, seen: int | None) -> Told:
        return asyncio.run(self.teller.tell(seen))


def test_the_first_answer_comes_at_once_and_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank(monkeypatch)
    rank.log.add(7)
    told = rank.tell(None)
    assert (told.load, told.cached.base, told.cached.added_items, told.held_s) == (IDLE, None, [7], 0.0)
    assert rank.tell(None).held_s == 0  # another router, or the same one started again


def test_a_rank_at_rest_is_silent_for_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank(monkeypatch)
    seen = rank.tell(None).cached.version
    told = rank.tell(seen)
    assert (told.held_s, told.load, told.cached.is_empty) == (1.0, IDLE, True)


def test_news_end_the_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank(monkeypatch)
    seen = rank.tell(None).cached.version
    rank.at[0.25] = BUSY
    told = rank.tell(seen)
    assert (told.load, told.held_s) == (BUSY, 0.25)
    rank.log.add(9)
    told = rank.tell(seen)
    assert (told.cached.added_items, told.held_s) == ([9], 0.0)


def test_a_rank_that_has_failed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Load:
        raise EngineFailed("it stopped")

    with pytest.raises(EngineFailed, match="it stopped"):
        asyncio.run(Teller(fail, DeltaLog().since, RouterConfig()).tell(None))
