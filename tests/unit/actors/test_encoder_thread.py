"""An encoder that hangs is noticed, and nobody waits for it any more."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch

from ernie_cluster.actors.encoder import Encoder
from ernie_cluster.actors.encoder_thread import EncoderThread
from ernie_cluster.errors import EngineFailed
from ernie_cluster.request import MediaInput
from tests.tiny import CPU, make_image, tiny_vision

LIMIT_S = 20.0


class Stuck(Encoder):
    """Encodes nothing before it may."""

    def __init__(self) -> None:
        super().__init__(tiny_vision(), CPU)
        self.has_begun, self.may_end = threading.Event(), threading.Event()

    def _run(self, media: MediaInput, frames: range) -> torch.Tensor:
        self.has_begun.set()
        assert self.may_end.wait(LIMIT_S)
        return super()._run(media, frames)


def test_a_picture_that_hangs_fails_all_that_wait_and_the_replica() -> None:
    encoder, now_s = Stuck(), 0.0
    cached = make_image(9)
    encoder.may_end.set()
    encoder.embed(cached)
    encoder.may_end.clear()
    encoder.has_begun.clear()
    thread = EncoderThread(encoder, 5.0, lambda _: None, clock=lambda: now_s)

    async def play() -> None:
        nonlocal now_s
        waiting = [asyncio.create_task(thread.rows(str(i), make_image(i))) for i in (1, 2, 1)]
        assert await asyncio.to_thread(encoder.has_begun.wait, LIMIT_S)
        now_s = 5.0
        thread.look_after()
        now_s = 5.1
        for _ in range(2):
            with pytest.raises(EngineFailed, match=r"for 5 s, longer than engine\.step_timeout_s"):
                thread.look_after()
        ends = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(end) for end in ends] == [EngineFailed] * 3
        with pytest.raises(EngineFailed):
            await thread.rows("late", make_image(3))
        assert (await thread.rows("known", cached))[1]

    asyncio.run(asyncio.wait_for(play(), LIMIT_S))
    thread.close()  # does not wait for it
    encoder.may_end.set()


def test_who_gives_up_leaves_nothing_behind_and_the_next_is_served() -> None:
    encoder = Stuck()
    thread = EncoderThread(encoder, 60.0, lambda _: None)

    async def play() -> None:
        first = asyncio.create_task(thread.rows("a", make_image(1)))
        assert await asyncio.to_thread(encoder.has_begun.wait, LIMIT_S)
        second = asyncio.create_task(thread.rows("b", make_image(2)))
        await asyncio.sleep(0)
        for task in (first, second):
            task.cancel()
        await asyncio.wait([first, second])
        assert not thread._waiting
        encoder.may_end.set()
        rows, is_hit = await thread.rows("c", make_image(2))
        assert (rows.tobytes(), is_hit) == (Encoder(tiny_vision(), CPU).embed(make_image(2))[0].tobytes(), False)

    asyncio.run(asyncio.wait_for(play(), LIMIT_S))
    thread.close()
