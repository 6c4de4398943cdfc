"""Many clients at once, some of whom leave: the others are served, and everything that was held comes back."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import httpx
import pytest

from tests.e2e.application import CHAT, Application, Streamed, chat_body, eventually, run

NUM_CLIENTS = 32


def body_of(client: int) -> dict[str, Any]:
    """Text and pictures, for both models; eight different requests."""
    kind = client % 8
    picture = kind if kind % 3 == 0 else None
    return chat_body(
        "tiny" if kind < 5 else "mixed", f"Number {kind}?", picture=picture, max_tokens=24 + kind, include_timeline=True
    )


async def leave_in_mid_stream(app: Application, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    async with aclosing(app.stream(client, body | {"max_tokens": 500})) as answer:
        async for so_far in answer:
            if so_far.num_chunks >= 3:
                return


async def leave_before_the_first_token(app: Application, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await app.read(client, body | {"max_tokens": 500})


async def read_to_the_end(app: Application, client: httpx.AsyncClient, body: dict[str, Any]) -> Streamed:
    return await app.read(client, body)


async def ask_in_one_piece(app: Application, client: httpx.AsyncClient, body: dict[str, Any]) -> Streamed:
    response = await client.post(app.url + CHAT, json=body, timeout=120)
    assert response.status_code == 200, response.text
    whole = response.json()
    choice = whole["choices"][0]
    return Streamed(choice["message"]["content"], choice["finish_reason"], is_done=True, timeline=whole["timeline"])


BEHAVIOURS = (
    read_to_the_end, leave_in_mid_stream, ask_in_one_piece, read_to_the_end, leave_before_the_first_token,
)  # fmt: skip


def test_crowd_of_clients_some_of_whom_leave(app: Application) -> None:
    async def crowd() -> list[Streamed | None]:
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=NUM_CLIENTS)) as client:
            asks = [BEHAVIOURS[i % len(BEHAVIOURS)](app, client, body_of(i)) for i in range(NUM_CLIENTS)]
            return list(await asyncio.gather(*asks))

    answers = run(crowd())
    stayed = {i: answer for i, answer in enumerate(answers) if answer is not None}
    assert len(stayed) > NUM_CLIENTS / 2
    for i, answer in stayed.items():
        assert (answer.is_done, answer.finish_reason) == (True, "length"), f"client {i}: {answer}"
        assert answer.num_attempts == 1, f"client {i} was disturbed by those who left: {answer.timeline}"
    eventually(app.objection_to_rest, 15)
    alone = [app.post(body_of(i)).json()["choices"][0]["message"]["content"] for i in range(8)]
    assert {i: a.text for i, a in stayed.items()} == {i: alone[i % 8] for i in stayed}, "company changed an answer"


@pytest.mark.parametrize("model", ["tiny", "mixed"])
def test_client_that_leaves_frees_its_blocks_at_once(app: Application, model: str) -> None:
    eventually(app.objection_to_rest, 15)

    async def leave() -> None:
        async with httpx.AsyncClient() as client:
            body = chat_body(model, "A long story.", picture=5, max_tokens=2000)
            async with aclosing(app.stream(client, body)) as answer:
                async for so_far in answer:
                    if so_far.num_chunks >= 3:
                        break
                loads = [app.load(i) for i in app.replicas(model) if i.role in ("decode", "mixed")]
                assert sum(load.num_running for load in loads) == 1
                assert any(load.free_blocks < load.total_blocks for load in loads)

    run(leave())
    eventually(app.objection_to_rest, 3)


def test_full_replica_refuses_and_serves_again(app: Application) -> None:
    body = chat_body("small", "Hello", max_tokens=80)  # six or more of the 24 blocks

    async def fill() -> httpx.Response:
        async with httpx.AsyncClient() as client:
            streams = [app.stream(client, body) for _ in range(3)]
            try:
                for stream in streams:
                    await anext(stream)
                return await client.post(app.url + CHAT, json=body | {"max_tokens": 200}, timeout=60)
            finally:
                for stream in streams:
                    await stream.aclose()

    refused = run(fill())
    assert refused.status_code == 429, refused.text
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert int(refused.headers["retry-after"]) >= 1
    eventually(lambda: "" if app.post(body | {"max_tokens": 200}).status_code == 200 else "still refused", 10)


def test_more_than_fits_at_once_is_served_one_after_the_other(app: Application) -> None:
    body = chat_body("small", "Hello", max_tokens=100)

    async def insist(client: httpx.AsyncClient) -> str:
        while True:
            response = await client.post(app.url + CHAT, json=body, timeout=60)
            if response.status_code == 200:
                text: str = response.json()["choices"][0]["message"]["content"]
                return text
            assert response.status_code == 429, response.text
            await asyncio.sleep(float(response.headers["retry-after"]))

    async def crowd() -> list[str]:
        async with httpx.AsyncClient() as client:
            return list(await asyncio.gather(*(insist(client) for _ in range(8))))

    assert len(set(run(crowd()))) == 1
    eventually(app.objection_to_rest, 15)


def test_a_flood_is_served_or_told_when_to_come_back(app: Application) -> None:
    """Ten times what fits, batch work among it, and some that brings little time."""

    async def ask(client: httpx.AsyncClient, number: int) -> httpx.Response:
        body = chat_body("small", f"Number {number}?", max_tokens=60, priority=int(number % 5 == 4))
        headers = {"x-request-timeout": "0.01"} if number % 7 == 3 else {}
        return await client.post(app.url + CHAT, json=body, headers=headers, timeout=120)

    async def flood() -> list[httpx.Response]:
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None)) as client:
            return list(await asyncio.gather(*(ask(client, number) for number in range(40))))

    answers = run(flood())
    patient = [answer for number, answer in enumerate(answers) if number % 7 != 3]
    assert {answer.status_code for answer in patient} == {200, 429}
    assert {answer.status_code for answer in answers} <= {200, 429, 504}
    assert all(int(a.headers["retry-after"]) >= 1 for a in answers if a.status_code == 429)
    eventually(app.objection_to_rest, 15)
    assert app.ask("small", "Hello")["choices"][0]["finish_reason"] == "length"
