"""What a client can get wrong, each with its status, the field named, OpenAI's shape, and a server that goes on."""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from dataclasses import replace

import httpx
import pytest

from tests.fakes import FakeProcessor
from tests.unit.api.client import CHAT_URL, Connection, Server, chat_body
from tests.unit.api.hostile.house import House
from tests.unit.api.hostile.row import LIMITS, Row, content, tool
from tests.unit.api.hostile.table import TABLE

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(180, func_only=True)]  # the house brings torch


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    return House(tmp_path_factory.mktemp("eyes"))


def check(row: Row, response: httpx.Response) -> None:
    assert response.status_code == row.status, response.text
    if row.status == 200 or row.method == "HEAD":
        return
    body = response.json()
    error = body["error"]
    assert 0 < len(error["message"]) < 400
    if row.path.startswith("/v1/messages"):
        assert (body["type"], error.keys()) == ("error", {"type", "message"})
        assert error["type"] == ("not_found_error" if row.status == 404 else "invalid_request_error")
        assert (row.param or "") in error["message"]
        return
    assert body.keys() == {"error"}
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == row.param, error["message"]


def test_names_are_unique() -> None:
    assert len({row.name for row in TABLE}) == len(TABLE) > 300


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
async def test_hostile_request(row: Row, house: House) -> None:
    house.num_generated()
    tasks = asyncio.all_tasks()
    check(row, await house.send(row))
    assert (house.num_generated() > 0) is (row.status == 200 and row.method == "POST" and "tokenize" not in row.path)
    assert house.objection_to_rest(tasks) == ""


async def test_nothing_is_kept_of_hostile_requests(house: House) -> None:
    """No object stays, so there is less than one more for each request, once the caches have all that they want."""

    async def send_all() -> int:
        for row in TABLE:
            check(row, await house.send(row))
            house.num_generated()
        gc.collect()
        return sys.getallocatedblocks()

    tasks = asyncio.all_tasks()
    counts = [await send_all()]
    while len(counts) < 3 or counts[-1] - counts[-2] >= len(TABLE):
        assert len(counts) < 9, f"it grows and grows: {counts}"
        counts.append(await send_all())
    good = await house.send(Row("good", chat_body(), 200))
    assert good.json()["choices"][0]["message"]["content"] == "Hello"
    assert house.objection_to_rest(tasks) == ""


@pytest.mark.parametrize(("piece", "status"), [(b"", 408), (b" ", 408), (b"x" * 1000, 413)])
async def test_a_body_that_never_ends(piece: bytes, status: int) -> None:
    """Its pieces keep coming, so that no wait for one of them is long."""
    timeout_s = LIMITS.body_timeout_s if status == 413 else 0.05
    server = Server(limits=replace(LIMITS, body_timeout_s=timeout_s))
    connection = Connection(server.app, b"{", is_complete=False)
    while not connection.task.done():
        connection.feed(piece)
        await asyncio.sleep(0)
    assert (await connection.message())["status"] == status
    assert server.metrics.value("ernie_requests_in_flight", model="unknown") == 0


@pytest.mark.parametrize("name", ["model", "messages"])
async def test_a_missing_field_is_named(name: str, house: House) -> None:
    body = chat_body()
    del body[name]
    row = Row(name, body, 400, name)
    check(row, await house.send(row))


OWN_BYTES = len("content-type" + "application/json")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([(b"x-%d" % i, b"") for i in range(99)], 200),
        ([(b"x-%d" % i, b"") for i in range(100)], 431),
        ([(b"x", b"")] * 100, 431),
        ([(b"big", b"y" * (65_533 - OWN_BYTES))], 200),
        ([(b"big", b"y" * (65_534 - OWN_BYTES))], 431),
    ],
)
async def test_number_and_size_of_headers(headers: list[tuple[bytes, bytes]], status: int) -> None:
    server = Server()
    connection = Connection(server.app, json.dumps(chat_body()).encode(), headers=headers)
    start, answer = await connection.message(), await connection.message()
    await connection.task
    assert start["status"] == status
    assert b"x-request-id" in dict(start["headers"])
    assert ("error" in json.loads(answer["body"])) is (status == 431)
    assert len(server.backend.requests) == (status == 200)


async def test_a_body_at_every_limit_passes() -> None:
    server = Server(limits=LIMITS, processor=FakeProcessor(max_model_len=4096))
    good = chat_body(
        **content([{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]),
        max_tokens=4096 - len("<user>look#"),
        temperature=2,
        top_p=1,
        top_k=-1,
        min_p=0,
        repetition_penalty=10,
        presence_penalty=-2,
        frequency_penalty=2.0,
        logit_bias={"256": -100},
        seed=-(2**63),
        stop=["x" * 256] * 16,
        stop_token_ids=[256] * 64,
        n=3,
        min_tokens=0,
        user="u",
        tools=[tool(name="f", parameters={"type": "object"})] * 2,
        tool_choice="auto",
        logprobs=False,
        response_format={"type": "text"},
        something_new={"is": "ignored"},
        x=eval("[" * 31 + "]" * 31),  # depth 32 with the body itself
    )  # fmt: skip
    response = await server.post(CHAT_URL, good)
    assert response.status_code == 200, response.text
    assert len(response.json()["choices"]) == 3


async def test_null_means_not_given() -> None:
    names = ["max_tokens", "temperature", "seed", "stop", "n", "stream", "stream_options", "logit_bias", "tools"]
    response = await Server().chat(**dict.fromkeys(names))
    assert response.status_code == 200, response.text


async def test_errors_do_not_send_data_back() -> None:
    secret = "s3cret" * 100
    response = await Server().post(CHAT_URL, chat_body(**content([{"type": "text", "text": {"a": secret}}])))
    assert response.status_code == 400
    assert "s3cret" not in response.text
