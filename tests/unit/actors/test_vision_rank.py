"""Vision replicas without Ray, between an encoder on the tiny model and a worker that waits for pictures."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ernie_cluster.actors import encoder as encoding
from ernie_cluster.actors.encoder import Encoder, runs_of
from ernie_cluster.actors.messages import Batch, EncodeReport, EncodeTask
from ernie_cluster.actors.vision_rank import VisionRank
from ernie_cluster.config.router import RouterConfig
from ernie_cluster.errors import Aborted
from ernie_cluster.request import GenerationRequest, MediaInput
from ernie_cluster.transport.choose import Endpoint
from ernie_cluster.transport.local import LocalChannel, LocalReceiver
from tests.tiny import CPU, make_image, make_request, make_worker, run_mixed, tiny_config, tiny_vision
from tests.unit.actors.test_duty import rank_of

PICTURES = [make_image(seed, (1, 4, 4 + 2 * seed)) for seed in range(3)]
THERE = Endpoint("here", None, "prefill")


@contextmanager
def ranks(count: int, receiver: LocalReceiver, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Loaded, with a way to the receiver each."""
    made = []
    for number in range(count):
        rank = rank_of(VisionRank, "vision", monkeypatch)
        channel = LocalChannel(receiver, f"vision-{number}")
        rank._encoder = Encoder(tiny_vision(), CPU)
        rank._channels = SimpleNamespace(to=lambda _, channel=channel: channel, close=channel.close)
        rank._piece_bytes, rank._timeout_s = 2048, 30.0
        rank._begin(lambda: None)
        made.append(rank)
    yield made
    for rank in made:
        rank._thread.close()
        rank._channels.close()


def task(request: GenerationRequest, *media: int) -> EncodeTask:
    return EncodeTask(request.request_id, 0, {i: request.media[i] for i in media}, THERE)


def was_cached(report: EncodeReport) -> dict[int, bool]:
    """By number of the picture, from 1."""
    details = [dict(span.detail) for span in report.spans if span.name == "encode"]
    return {int(detail["picture"]): bool(detail["cached"]) for detail in details}


def test_replicas_that_share_the_pictures_of_a_request_give_what_one_engine_sees(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompt: list[int | MediaInput] = [5, PICTURES[0], 6, PICTURES[1], PICTURES[2], 7]
    alone, said = make_worker()
    run_mixed(alone, [make_request(prompt, "a", max_tokens=4)])
    said.drain()
    worker, outcomes = make_worker()
    request = make_request(prompt, "a", max_tokens=4)
    with ranks(2, LocalReceiver(worker.inbox), monkeypatch) as (one, two):
        two._encoder.embed(request.media[1])
        worker.start()
        worker.open_prefill(request, 0, None)

        async def encode() -> list[EncodeReport]:
            async with asyncio.timeout(30):
                told: list[EncodeReport] = list(
                    await asyncio.gather(one.encode(task(request, 0, 2)), two.encode(task(request, 1)))
                )
                return told

        reports = asyncio.run(encode())
        outcomes.wait_for(["a"])
        worker.stop()
    assert [was_cached(report) for report in reports] == [{1: False, 3: False}, {2: True}]
    assert outcomes.tokens == said.tokens
    assert worker.check()


def test_it_shows_that_it_lives_while_its_encoder_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, _ = make_worker()
    request = make_request([5, PICTURES[0], 7], "a", max_tokens=4)
    release = threading.Event()
    with ranks(1, LocalReceiver(worker.inbox), monkeypatch) as (rank,):
        limits = RouterConfig(heartbeat_timeout_s=0.3)
        config = dataclasses.replace(rank._args.config, router=limits)
        rank._args = dataclasses.replace(rank._args, config=config)
        rank._thread._thread.submit(release.wait, 30)
        worker.open_prefill(request, 0, None)

        async def play() -> EncodeReport:
            encoding = asyncio.create_task(rank.encode(task(request, 0)))
            assert [await rank.poll("me", i) for i in range(3)] == [Batch(i + 1, ()) for i in range(3)]
            assert not encoding.done()
            release.set()
            report: EncodeReport = await encoding
            return report

        assert was_cached(asyncio.run(asyncio.wait_for(play(), 30))) == {1: False}
    worker.abort("a")
    worker.engine.step()
    assert worker.check()


def test_a_task_that_is_given_up_waits_no_more_for_a_prompt_that_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, _ = make_worker()
    request = make_request([5, PICTURES[0], 7], "a", max_tokens=4)
    with ranks(1, LocalReceiver(worker.inbox), monkeypatch) as (rank,):

        async def play() -> None:
            encoding = asyncio.create_task(rank.encode(task(request, 0)))
            while not worker.inbox._claims._waiting:  # noqa: ASYNC110  a thread of the transport says so
                await asyncio.sleep(0.001)
            assert rank._now().num_running == 1
            await rank.abort(["a", "unknown"])
            with pytest.raises(Aborted):
                await encoding
            assert rank._now().is_idle

        asyncio.run(asyncio.wait_for(play(), 20))


def test_a_cached_picture_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, _ = make_worker()
    request = make_request([5, PICTURES[0], 7], "a", max_tokens=4)
    busy = threading.Event()
    with ranks(1, LocalReceiver(worker.inbox), monkeypatch) as (rank,):
        expected, _ = rank._encoder.embed(request.media[0])
        rank._thread._thread.submit(busy.wait, 30)
        worker.open_prefill(request, 0, None)

        async def encode() -> EncodeReport:
            async with asyncio.timeout(20):
                encoding = asyncio.create_task(rank.encode(task(request, 0)))
                await asyncio.sleep(0)
                assert rank._waiting_tokens == 0
                report: EncodeReport = await encoding
                return report

        assert was_cached(asyncio.run(encode())) == {1: True}
        busy.set()
    embeds = worker.engine.sequences["a"].embeds[0]
    assert embeds.view(torch.uint8).numpy().tobytes() == expected.tobytes()
    worker.abort("a")
    worker.engine.step()
    assert worker.check()


@given(st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)), st.integers(1, 500))
def test_runs_are_whole_pairs_within_the_bound_and_cover_every_frame_once(
    grid: tuple[int, int, int], most: int
) -> None:
    num_frames = grid[0] if grid[0] == 1 else 2 * grid[0]
    runs = runs_of((num_frames, *grid[1:]), most)
    assert [frame for run in runs for frame in run] == list(range(num_frames))
    for run in runs:
        assert run.start % 2 == 0
        assert len(run) <= 2 or len(run) * grid[1] * grid[2] <= most


@pytest.mark.parametrize("grid", [(1, 4, 6), (2, 4, 4), (10, 4, 6), (6, 2, 8)])
@pytest.mark.parametrize("most_patches", [1, 40, 100])
def test_a_video_in_pieces_is_the_whole_video(
    grid: tuple[int, int, int], most_patches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = make_image(3, grid)
    with torch.inference_mode():
        whole = tiny_vision()(torch.tensor(video.patches), [grid])
    monkeypatch.setattr(encoding, "PIECE_PATCHES", most_patches)
    steps = list(Encoder(tiny_vision(), CPU).steps(video))
    assert [rows is None for rows in steps] == [True] * (len(runs_of(grid, most_patches)) - 1) + [False]
    assert steps[-1] is not None
    torch.testing.assert_close(torch.from_numpy(steps[-1]).view(torch.float32), whole, rtol=1e-4, atol=1e-5)


class Turns(Encoder):
    """Notes whose frames it encodes."""

    def __init__(self) -> None:
        super().__init__(tiny_vision(), CPU)
        self.seen: list[tuple[MediaInput, range]] = []
        self.after = dict[int, Any]()
        """By number of a piece: what happens once it is encoded."""

    def _run(self, media: MediaInput, frames: range) -> torch.Tensor:
        self.seen.append((media, frames))
        embeds = super()._run(media, frames)
        self.after.pop(len(self.seen), lambda: None)()
        return embeds


def see_with(rank: Any, encoder: Turns) -> Turns:
    """Another encoder for a rank."""
    rank._thread.close()
    rank._encoder = encoder
    rank._begin(lambda: None)
    return encoder


def test_a_picture_waits_for_one_piece_of_a_video_that_came_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "PIECE_PATCHES", 1)
    worker, _ = make_worker()
    video, picture = make_image(1, (20, 4, 4)), make_image(2)
    with ranks(1, LocalReceiver(worker.inbox), monkeypatch) as (rank,):
        eyes = see_with(rank, Turns())

        async def look() -> None:
            async with asyncio.timeout(30):
                loop, later = asyncio.get_running_loop(), list[asyncio.Task[Any]]()
                has_begun, has_come = asyncio.Event(), threading.Event()

                def come() -> None:
                    loop.call_soon_threadsafe(has_begun.set)
                    has_come.wait(20)

                eyes.after[3] = come
                first = asyncio.create_task(rank.embed("video", video))
                await has_begun.wait()
                later.append(asyncio.create_task(rank.embed("picture", picture)))
                await asyncio.sleep(0)
                has_come.set()
                await asyncio.gather(first, *later)

        asyncio.run(look())
    place = [media is picture for media, _ in eyes.seen].index(True)
    assert place <= 4, "three pieces, and the one that is under way"
    assert len(eyes.seen) == 11


def test_two_that_want_one_video_have_it_encoded_once_also_when_the_first_gives_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(encoding, "PIECE_PATCHES", 1)
    worker, _ = make_worker()
    video, other = make_image(1, (8, 4, 4)), make_image(2, (8, 4, 4))
    with ranks(1, LocalReceiver(worker.inbox), monkeypatch) as (rank,):
        eyes = see_with(rank, Turns())

        async def look() -> None:
            async with asyncio.timeout(30):
                await asyncio.gather(rank.embed("a", video), rank.embed("b", video))
                assert len(eyes.seen) == 4
                eyes.after[5] = lambda: rank._aborted.add("a")
                ends: Any = await asyncio.gather(rank.embed("a", other), rank.embed("b", other), return_exceptions=True)
                assert isinstance(ends[0], Aborted)
                assert ends[1].shape == (tiny_config().text.hidden_size,)

        asyncio.run(look())
    assert [frames.start for _, frames in eyes.seen[4:]] == [0, 0, 2, 4, 6]
    assert not rank._thread._twins
