"""A model's name that stands for two: who answers, and how the client learns of it."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from ernie_cluster.actors.auto_model import AutoModel
from ernie_cluster.config.auto_model import AutoModelConfig
from tests.fakes import FakeProcessor
from tests.unit.api.client import CHAT_URL, COMPLETION_URL, Server

pytestmark = pytest.mark.anyio

CONFIG = AutoModelConfig("424b", "28b", long_prompt_tokens=50, large_media_bytes=1000, ttft_s=2.0, memory_s=60.0)


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def server() -> tuple[Server, AutoModel, Clock]:
    clock = Clock()
    auto = AutoModel(CONFIG, clock)
    return Server(processor=FakeProcessor("28b"), others=(FakeProcessor("424b", 400),), alias=auto), auto, clock


def chat(content: Any = "Hello", **fields: Any) -> dict[str, Any]:
    return {"model": "ernie-auto", "messages": [{"role": "user", "content": content}], "max_tokens": 8, **fields}


@pytest.mark.parametrize(
    ("body", "model"),
    [
        (chat(), "28b"),
        (chat(enable_thinking=True), "424b"),
        (chat("long" * 60), "424b"),
        (chat([{"type": "text", "text": "long" * 60}]), "424b"),
        (chat() | {"model": "424b"}, "424b"),
        (chat(enable_thinking=True) | {"model": "28b"}, "28b"),
    ],
)
async def test_the_answer_names_who_served_it(body: dict[str, Any], model: str) -> None:
    house, _, _ = server()
    response = await house.post(CHAT_URL, body)
    assert response.status_code == 200
    assert response.json()["model"] == model
    assert [r.model for r in house.backend.requests] == [model]


async def test_a_large_picture_goes_to_the_large_model() -> None:
    house, _, _ = server()
    for size, model in ((300, "28b"), (1500, "424b")):
        url = "data:image/png;base64," + base64.b64encode(bytes(size)).decode()
        body = chat([{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}])
        response = await house.post(CHAT_URL, body)
        assert response.json()["model"] == model


@pytest.mark.parametrize(
    ("prompt", "model"), [("short", "28b"), ("long" * 60, "424b"), ([1] * 60, "424b"), ([[1], [2] * 60], "424b")]
)
async def test_texts_are_chosen_for_too(prompt: Any, model: str) -> None:
    house, _, _ = server()
    response = await house.post(COMPLETION_URL, {"model": "ernie-auto", "prompt": prompt, "max_tokens": 4})
    assert response.json()["model"] == model


async def test_every_event_names_who_serves_and_the_timeline_why() -> None:
    house, _, _ = server()
    response = await house.post(CHAT_URL, chat(enable_thinking=True, stream=True, include_timeline=True))
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    assert {e["model"] for e in events} == {"424b"}
    assert "thinking was asked for" in response.text


async def test_a_late_model_gives_to_the_other_where_the_client_allows_it() -> None:
    house, auto, clock = server()
    auto.saw("424b", 5.0)
    for fields, model in (
        ({"allow_smaller_model": True}, "28b"),
        ({}, "424b"),
        ({"allow_smaller_model": False}, "424b"),
    ):
        auto.saw("424b", 5.0)
        response = await house.post(CHAT_URL, chat(enable_thinking=True, **fields))
        assert response.json()["model"] == model
    auto.saw("424b", 50.0)
    clock.now_s += 61  # it is tried again
    response = await house.post(CHAT_URL, chat(enable_thinking=True, allow_smaller_model=True))
    assert response.json()["model"] == "424b"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (
            "/v1/messages",
            {
                "max_tokens": 4,
                "messages": [{"role": "user", "content": "hi"}],
                "thinking": {"type": "enabled", "budget_tokens": 2},
            },
        ),
        ("/v1/responses", {"max_output_tokens": 4, "input": "hi", "reasoning": {"effort": "high"}}),
    ],
)
async def test_other_dialects_allow_it_too(path: str, body: dict[str, Any]) -> None:
    house, auto, _ = server()
    for allows, model in ((True, "28b"), (False, "424b")):
        auto.saw("424b", 50.0)
        response = await house.post(path, body | {"model": "ernie-auto", "allow_smaller_model": allows, "priority": 5})
        assert response.json()["model"] == model, response.text


async def test_the_alias_is_listed_with_what_both_can_hold() -> None:
    house, _, _ = server()
    async with house.client() as client:
        cards = {m["id"]: m for m in (await client.get("/v1/models")).json()["data"]}
        assert list(cards) == ["28b", "424b", "ernie-auto"]
        assert cards["ernie-auto"]["max_model_len"] == 400
        assert (await client.get("/v1/models/ernie-auto")).json() == cards["ernie-auto"]
        assert (await client.get("/v1/models/other")).status_code == 404
        tokens = await client.post("/tokenize", json={"model": "ernie-auto", "prompt": "abc"})
        assert tokens.json()["count"] == 3


async def test_an_unknown_model_is_told_the_alias_too() -> None:
    house, _, _ = server()
    response = await house.post(CHAT_URL, chat() | {"model": "other"})
    assert response.status_code == 404
    assert "ernie-auto" in response.json()["error"]["message"]
