"""Processes are killed while they work. Clients see a pause or one error, never silence; the application gets whole."""

from __future__ import annotations

import asyncio

import httpx
import ray

from tests.e2e.application import CHAT, Application, Streamed, chat_body, eventually, run

STORY = chat_body("tiny", "Once upon a time", max_tokens=160)


def whole_text(app: Application, body: dict[str, object]) -> str:
    text: str = app.post(body).json()["choices"][0]["message"]["content"]
    return text


async def begun(app: Application, client: httpx.AsyncClient, num_streams: int, num_chunks: int = 5) -> list[object]:
    """Streams of STORY that have got their first chunks, as tasks that end with the `Streamed`."""
    ready = [asyncio.Event() for _ in range(num_streams)]

    async def read(i: int) -> Streamed:
        answer = Streamed()
        async for answer in app.stream(client, STORY):
            if answer.num_chunks >= num_chunks:
                ready[i].set()
        return answer

    tasks: list[object] = [asyncio.create_task(read(i)) for i in range(num_streams)]
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


def test_all_decode_ranks_killed_in_mid_stream(whole_app: Application) -> None:
    app, text = whole_app, whole_text(whole_app, STORY)

    async def play() -> list[Streamed]:
        async with httpx.AsyncClient() as client:
            streams = await begun(app, client, 3)
            for info in app.replicas("tiny", "decode"):
                ray.kill(app.rank(info))
            return await asyncio.gather(*streams)  # type: ignore[call-overload, no-any-return]

    check_whole(run(play()), text)


def test_prefill_rank_killed(whole_app: Application) -> None:
    """What decodes does not notice; what was being prefilled waits for the next prefill replica."""
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
    assert late.status_code == 200, late.text
    assert whole_text(app, long_prompt) == answer
    assert late.json()["choices"][0]["message"]["content"] == whole_text(app, fresh)


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
