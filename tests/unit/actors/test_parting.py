"""When a rank parts with what it has: not before, not twice, and never again once it was told to stay."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import uvloop

from ernie_cluster.actors.duty import Duty
from ernie_cluster.actors.engine_rank import EngineRank
from ernie_cluster.actors.messages import EncodeTask
from ernie_cluster.actors.parting import Parting
from ernie_cluster.actors.vision_rank import VisionRank
from ernie_cluster.errors import OrderRefused, ReplicaDraining
from tests.tiny import make_image, make_request
from tests.unit.actors.test_duty import args_of, load_of, rank_of
from tests.unit.actors.test_vision_rank import THERE
from tests.unit.engine.toy import toy_worker

LONG_S = 3600.0


class Rank:
    """Only parts, and stays."""

    def __init__(self) -> None:
        self.did: list[str] = []
        self.has_parted = asyncio.Event()
        self.duty = Duty(args_of("decode"))
        self.parting = Parting(self.duty, self._part, lambda: self.did.append("stay"))

    def _part(self) -> None:
        self.did.append("part")
        self.has_parted.set()


def play(test: Any, loop: Callable[[], asyncio.AbstractEventLoop] | None = None) -> None:
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(asyncio.wait_for(test(), 30))


@pytest.mark.parametrize("loop", [None, uvloop.new_event_loop])  # Ray's actors run on uvloop
@pytest.mark.parametrize("first", [None, LONG_S, 0.0])
def test_the_sooner_of_two_times_counts(first: float | None, loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def test() -> None:
        rank = Rank()
        rank.parting.drain(True, first)
        assert (rank.duty.is_draining, rank.duty.within_s) == (True, first)
        rank.parting.drain(True, 0.0)
        rank.parting.drain(True, LONG_S)
        await rank.has_parted.wait()
        assert (rank.did, rank.duty.within_s) == (["part"], 0.0)

    play(test, loop)


def test_who_stays_does_not_part() -> None:
    async def test() -> None:
        rank = Rank()
        rank.parting.drain(True, 0.0)
        rank.parting.drain(False)
        await asyncio.sleep(0)  # the loop's turn, in which the timer was due
        await asyncio.sleep(0)
        assert "part" not in rank.did
        assert (rank.duty.is_draining, rank.duty.within_s) == (False, None)
        rank.parting.drain(True, 0.0)
        await rank.has_parted.wait()
        rank.parting.drain(False)
        assert rank.did[-2:] == ["part", "stay"]

    play(test)


def test_who_leaves_does_not_turn_back() -> None:
    async def test() -> None:
        rank = Rank()
        rank.parting.leave(0.0)
        with pytest.raises(OrderRefused, match="is being stopped"):
            rank.parting.drain(False)
        assert rank.duty.is_draining
        await rank.has_parted.wait()

    play(test)


def test_an_engine_rank_parts_and_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = rank_of(EngineRank, "decode", monkeypatch)
    rank._worker, _ = toy_worker(30, 4)

    async def test() -> None:
        request = make_request(range(10, 19), "a", max_tokens=3)
        rank._worker.open_prefill(request, 0, None)
        await rank.drain(True, 0.0)
        while rank._worker.engine.has_work():
            rank._worker.engine.step()
            await asyncio.sleep(0)
        with pytest.raises(ReplicaDraining, match="request a"):
            await rank.open_prefill("me", request, 1, None)
        await rank.drain(False)
        await rank.open_prefill("me", request, 1, None)
        rank._upkeep.cancel()

    play(test)
    load = load_of(rank)
    assert (load.num_prompts, load.is_draining, load.within_s) == (1, False, None)


def test_a_vision_rank_encodes_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = rank_of(VisionRank, "vision", monkeypatch)
    picture = make_image(0, (1, 4, 4))

    async def test() -> None:
        await rank.leave(0.0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        with pytest.raises(ReplicaDraining, match="request a"):
            await rank.encode(EncodeTask("a", 0, {0: picture}, THERE))
        with pytest.raises(ReplicaDraining, match="request b"):
            await rank.embed("b", picture)
        assert not rank._running

    play(test)
