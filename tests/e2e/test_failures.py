"""Processes are killed while they work. Clients see a pause or one error, never silence; the application gets whole."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import pytest
import ray

from tests.e2e.application import CHAT, Application, Streamed, chat_body, eventually, run

STORY = chat_body("tiny", "Once upon a time", max_tokens=160, include_timeline=True)
LETTERS = {"type": "array", "items": {"enum": list("abcdefgh")}, "minItems": 40, "maxItems": 40}
"""What an answer is made to match that runs for a while."""


def whole_text(app: Application, body: dict[str, object]) -> str:
    text: str = app.post(body).json()["choices"][0]["message"]["content"]
    return text


async def begun(
    app: Application, client: httpx.AsyncClient, num_streams: int, num_chunks: int = 5, *others: dict[str, object]
) -> list[object]:
    """Streams of STORY, and others, that have got their first chunks, as tasks that end with the `Streamed`."""
    bodies = [STORY] * num_streams + list(others)
    ready = [asyncio.Event() for _ in bodies]

    async def read(i: int) -> Streamed:
        answer = Streamed()
        async for answer in app.stream(client, bodies[i]):
            if answer.num_chunks >= num_chunks:
                ready[i].set()
        return answer

    tasks: list[object] = [asyncio.create_task(read(i)) for i in range(len(bodies))]
    for event in ready:
        await event.wait()
    return tasks


def check_whole(answers: list[Streamed], text: str) -> None:
    """Every answer went on to its end with the same tokens."""
    for answer in answers:
        assert answer.error is None, answer.error
        assert (answer.is_done, answer.finish_reason) == (True, "length")
        assert answer.text == text


def test_decode_rank_killed_in_mid_stream(whole_app: Application) -> None:
    app, text = whole_app, whole_text(whole_app, STORY)

    async def play() -> list[Streamed]:
        async with httpx.AsyncClient() as client:
            streams = await begun(app, client, 4)
            busy = max(app.replicas("tiny", "decode"), key=lambda i: app.load(i).num_running)
            ray.kill(app.rank(busy))
            return await asyncio.gather(*streams)  # type: ignore[call-overload, no-any-return]

    check_whole(run(play()), text)


@contextmanager
def stopped(actor: Any) -> Iterator[None]:
    """A process that hangs for as long as the block lasts, and goes on afterwards."""
    pid = ray.get(actor.__ray_call__.remote(lambda _: os.getpid()), timeout=10)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):  # whoever was killed meanwhile
            os.kill(pid, signal.SIGCONT)


def test_decode_rank_stopped_in_mid_stream(whole_app: Application) -> None:
    """Whatever shapes an answer, it goes on elsewhere; the rank serves again afterwards."""
    app = whole_app
    seeded = STORY | {"temperature": 1.0, "seed": 7, "max_tokens": 120}
    form = {"type": "json_schema", "json_schema": {"name": "letters", "schema": LETTERS}}
    formed = seeded | {"response_format": form, "ignore_eos": False}
    texts = [whole_text(app, body) for body in (STORY, STORY, seeded, formed)]
    ranks = app.replicas("tiny", "decode")

    async def play() -> list[Streamed]:
        async with httpx.AsyncClient() as client:
            streams = await begun(app, client, 2, 5, seeded, formed)
            busy = max(ranks, key=lambda i: app.load(i).num_running)
            before = num_retries(app)
            with stopped(app.rank(busy)):
                await more_retries(
                    app, before
                )  # it goes on before it would be replaced, and says late what nobody wants
            return await asyncio.gather(*streams)  # type: ignore[call-overload, no-any-return]

    answers = run(play())
    assert [answer.text for answer in answers] == texts
    assert [(answer.is_done, answer.error) for answer in answers] == [(True, None)] * 4
    assert {answer.num_attempts for answer in answers} >= {2}
    eventually(app.objection_to_rest, 30)
    assert {i.incarnation for i in app.replicas("tiny", "decode")} == {i.incarnation for i in ranks}


def test_vision_rank_stopped_while_it_is_asked(whole_app: Application) -> None:
    """It is the only one: its request waits until it shows that it is well again."""
    app = whole_app
    body = chat_body("tiny", "And that?", picture=9, max_tokens=12, include_timeline=True)
    (vision,) = app.replicas("tiny", "vision")

    async def play() -> httpx.Response:
        async with httpx.AsyncClient() as client:
            with stopped(app.rank(vision)):
                before = num_retries(app)
                asked = asyncio.create_task(client.post(app.url + CHAT, json=body, timeout=90))
                await more_retries(app, before)
            return await asked

    response = run(play())
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["message"]["content"] == whole_text(app, body)
    assert app.replicas("tiny", "vision") == [vision]


def num_retries(app: Application) -> float:
    """Requests that have gone on after a loss."""
    lines = (line.rsplit(" ", 1) for line in app.get("/metrics").text.splitlines())
    name = 'ernie_request_retries_total{model="tiny",reason="ReplicaLost"}'
    return next((float(value) for metric, value in lines if metric == name), 0.0)


async def more_retries(app: Application, before: float) -> None:
    """Until another one has."""
    while await asyncio.to_thread(num_retries, app) <= before:  # noqa: ASYNC110
        await asyncio.sleep(0.1)


@pytest.mark.slow  # half a minute until all are back
def test_all_decode_ranks_killed_in_mid_stream(whole_app: Application) -> None:
    app, text = whole_app, whole_text(whole_app, STORY)

    async def play() -> list[Streamed]:
        async with httpx.AsyncClient() as client:
            streams = await begun(app, client, 3)
            for info in app.replicas("tiny", "decode"):
                ray.kill(app.rank(info))
            return await asyncio.gather(*streams)  # type: ignore[call-overload, no-any-return]

    check_whole(run(play()), text)


@pytest.mark.slow  # half a minute until all are back
def test_prefill_rank_killed(whole_app: Application) -> None:
    """What decodes does not notice; what was being prefilled waits for the next prefill replica.

    That one knows no prompts, and gets what a decode replica has kept of one.
    """
    app = whole_app
    long_prompt = chat_body("tiny", "All work and no play. " * 160, picture=6, max_tokens=12)
    story, answer = whole_text(app, STORY), whole_text(app, long_prompt)
    fresh = chat_body("tiny", "No play and all work. " * 160, picture=7, max_tokens=12)

    async def play() -> tuple[list[Streamed], httpx.Response]:
        async with httpx.AsyncClient() as client:
            streams = await begun(app, client, 2)
            (prefill,) = app.replicas("tiny", "prefill")
            asked = asyncio.create_task(client.post(app.url + CHAT, json=fresh, timeout=120))
            while not app.load(prefill).waiting_tokens:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            ray.kill(app.rank(prefill))
            return list(await asyncio.gather(*streams)), await asked  # type: ignore[call-overload]

    streams, late = run(play())
    check_whole(streams, story)
    assert [stream.num_attempts for stream in streams] == [1, 1], "their prompts were handed over"
    assert late.status_code == 200, late.text
    again = app.post(long_prompt | {"include_timeline": True}).json()
    assert again["choices"][0]["message"]["content"] == answer
    (fetch,) = (span for span in again["timeline"] if span["name"] == "fetch")
    assert fetch.get("bytes", 0) > 0, fetch
    assert 'ernie_prefix_fetches_total{model="tiny",outcome="fetched"}' in app.get("/metrics").text
    assert late.json()["choices"][0]["message"]["content"] == whole_text(app, fresh)


@pytest.mark.slow  # half a minute until all are back
def test_vision_rank_killed(whole_app: Application) -> None:
    app = whole_app
    body = chat_body("tiny", "And this?", picture=8, max_tokens=12)
    (vision,) = app.replicas("tiny", "vision")
    ray.kill(app.rank(vision))
    statuses: list[int] = []

    def objection() -> str:
        response = app.post(body, timeout_s=90)
        statuses.append(response.status_code)
        return "" if response.status_code == 200 else response.text

    eventually(objection, 60)
    assert set(statuses) <= {200, 429, 503}, "until then clients are told to come back"


def test_router_killed(whole_app: Application) -> None:
    """Running streams do not need it; new requests wait until it is back."""
    app, text = whole_app, whole_text(whole_app, STORY)

    async def play() -> tuple[list[Streamed], list[httpx.Response]]:
        async with httpx.AsyncClient() as client:
            streams = await begun(app, client, 2)
            ray.kill(app.router())
            new = await asyncio.gather(
                *(client.post(app.url + CHAT, json=chat_body(m, "Hello"), timeout=60) for m in ("tiny", "mixed"))
            )
            return list(await asyncio.gather(*streams)), list(new)  # type: ignore[call-overload]

    streams, new = run(play())
    check_whole(streams, text)
    assert [r.status_code for r in new] == [200, 200], [r.text for r in new]


@pytest.mark.slow  # half a minute until all are back
def test_router_stopped(whole_app: Application) -> None:
    """It is started again; requests wait until then."""
    app = whole_app
    app.text("tiny", "Hello")  # so that the API is connected to it

    async def play() -> httpx.Response:
        async with httpx.AsyncClient() as client:
            with stopped(app.router()):
                return await client.post(app.url + CHAT, json=chat_body("tiny", "Hello"), timeout=90)

    response = run(play())
    assert response.status_code == 200, response.text


def test_client_that_leaves_takes_nobody_with_it(whole_app: Application) -> None:
    """Not even the one whose request was the first on a replica, and has made the link that all use since."""
    app = whole_app
    (mixed,) = app.replicas("mixed", "mixed")
    ray.kill(app.rank(mixed))
    eventually(lambda: "" if mixed not in app.replicas() else "the dead replica is still known", 30)
    eventually(app.objection_to_ready, 90)

    async def play() -> Streamed:
        async with httpx.AsyncClient() as client:
            body = chat_body("mixed", "Who was first?", max_tokens=120, include_timeline=True)
            first, second = app.stream(client, body), app.stream(client, body)
            await anext(first)
            answer = await anext(second)
            await first.aclose()
            async for answer in second:  # noqa: B007
                pass
            return answer

    answer = run(play())
    assert (answer.is_done, answer.num_attempts) == (True, 1), answer
