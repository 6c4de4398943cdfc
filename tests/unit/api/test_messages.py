"""The Messages API as Anthropic's official client sees it, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import anthropic
import httpx2
import pytest
from anthropic.types import Message

from ernie_cluster.errors import Overloaded, ReplicaLost
from tests.fakes import FakeBackend, FakeProcessor, say
from tests.unit.api.client import Server
from tests.unit.api.test_responses import StrictProcessor
from tests.unit.api.test_tools import ANSWER, ARGUMENTS, CALLS

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

URL = "/v1/messages"
HI: Any = [{"role": "user", "content": "hi"}]
TOOLS: Any = [{"name": "weather", "input_schema": {"type": "object"}}]
PICTURE: Any = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}
ASK: dict[str, Any] = {
    "model": "tiny",
    "messages": HI,
    "max_tokens": 400,
    "tools": TOOLS,
    "thinking": {"type": "enabled", "budget_tokens": 1024},
}


@asynccontextmanager
async def connect(server: Server) -> AsyncIterator[anthropic.AsyncAnthropic]:
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(cast("Any", server.app)))
    async with anthropic.AsyncAnthropic(
        base_url="http://test", api_key="none", http_client=http, max_retries=0
    ) as client:
        yield client


def without_ids(message: Message) -> Any:
    content = [{k: v for k, v in block.to_dict().items() if k != "id"} for block in message.content]
    return message.to_dict() | {"id": "", "content": content}


async def test_whole() -> None:
    backend = FakeBackend(say("Hello"), num_cached_tokens=3)
    async with connect(Server(backend)) as client:
        message = await client.messages.create(
            model="tiny", messages=HI, max_tokens=20, system=[{"type": "text", "text": "be kind"}]
        )
    Message.model_validate(message.to_dict())
    (block,) = message.content
    assert (block.type, cast("Any", block).text, message.role) == ("text", "Hello", "assistant")
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    usage = message.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens) == (len("<system>be kind<user>hi") - 3, 3)
    assert usage.output_tokens == 6
    (request,) = backend.requests
    assert (request.request_id, request.sampling.max_tokens) == (f"{message.id}-0", 20)


@pytest.mark.parametrize("tokens_per_step", [1, 1000])
async def test_blocks(tokens_per_step: int) -> None:
    server = Server(FakeBackend(say(ANSWER, tokens_per_step)))
    async with connect(server) as client:
        message = await client.messages.create(**ASK)
    thought, text, *calls = cast("Any", message.content)
    assert (thought.thinking, text.text) == ("Two cities.", "Let me look.")
    assert [(c.name, c.input) for c in calls] == [("weather", json.loads(a)) for a in ARGUMENTS]
    assert len({c.id for c in calls}) == 2
    assert message.stop_reason == "tool_use"
    (call,) = server.processor.calls
    assert call["enable_thinking"] is True
    assert call["tools"] == [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("tokens_per_step", [1, 7, 1000])
@pytest.mark.parametrize("text", [ANSWER, "", f"hmm</think>{CALLS}and{CALLS}", "no end", f"x</think>{CALLS[:60]}"])
async def test_a_stream_is_the_whole_answer_in_pieces(text: str, tokens_per_step: int) -> None:
    server = Server(FakeBackend(say(text, tokens_per_step), num_cached_tokens=3))
    async with connect(server) as client:
        whole = await client.messages.create(**ASK)
        async with client.messages.stream(**ASK) as stream:
            kinds = [event.type async for event in stream]
            message = await stream.get_final_message()
    assert without_ids(cast("Any", message)) == without_ids(whole)
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")


async def test_events() -> None:
    response = await Server(FakeBackend(say("ab"))).post(URL, {**ASK, "thinking": None, "stream": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    names, bodies = [], []
    for block in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        names.append(name.removeprefix("event: "))
        bodies.append(json.loads(data.removeprefix("data: ")))
    assert [b["type"] for b in bodies] == names
    assert [n for n in names if n != "content_block_delta"] == [
        "message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"
    ]  # fmt: skip
    assert bodies[0]["message"]["usage"] == {"input_tokens": len("<user>hi"), "output_tokens": 0}


async def test_text_without_citations_does_not_speak_of_them() -> None:
    """As Anthropic's own; Vercel's AI SDK takes null there for a broken answer."""
    server = Server(FakeBackend(say("ab", 2)))
    ask = {"model": "tiny", "messages": HI, "max_tokens": 20}
    assert (await server.post(URL, ask)).json()["content"] == [{"type": "text", "text": "ab"}]
    events = (await server.post(URL, ask | {"stream": True})).text
    assert '"content_block":{"type":"text","text":""}' in events


async def test_stop_reasons() -> None:
    async with connect(Server(FakeBackend(say("one two three")))) as client:
        stopped = await client.messages.create(model="tiny", messages=HI, max_tokens=99, stop_sequences=["zz", " thr"])
        cut = await client.messages.create(model="tiny", messages=HI, max_tokens=3)
    assert cast("Any", stopped.content[0]).text == "one two"
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " thr")
    assert (cut.stop_reason, cut.stop_sequence) == ("max_tokens", None)


async def test_an_error_in_mid_stream_is_raised() -> None:
    async with connect(Server(FakeBackend([*say("par", finish_reason=None), ReplicaLost("gone")]))) as client:
        stream = await client.messages.create(model="tiny", messages=HI, max_tokens=9, stream=True)
        with pytest.raises(anthropic.APIStatusError) as error:
            async for _ in stream:
                pass
    assert cast("Any", error.value.body)["error"]["type"] == "overloaded_error"


async def test_errors_become_the_clients_own_classes() -> None:
    async with connect(Server(FakeBackend([Overloaded("full")]))) as client:
        with pytest.raises(anthropic.RateLimitError):
            await client.messages.create(model="tiny", messages=HI, max_tokens=9)
        with pytest.raises(anthropic.NotFoundError) as missing:
            await client.messages.create(model="none", messages=HI, max_tokens=9)
    assert cast("Any", missing.value.body)["error"]["type"] == "not_found_error"


@pytest.mark.parametrize(
    ("method", "status", "kind"), [("GET", 405, "invalid_request_error"), ("POST", 415, "invalid_request_error")]
)
async def test_every_error_of_the_route_has_anthropics_shape(method: str, status: int, kind: str) -> None:
    async with Server().client() as client:
        response = await client.request(method, URL, headers={"x-request-id": "r1"})
    body = response.json()
    assert (response.status_code, body["type"], body["error"]["type"]) == (status, "error", kind)
    assert body["request_id"] == "r1"


async def test_an_answer_can_be_sent_back_with_pictures_among_the_results() -> None:
    server = Server(FakeBackend(say(ANSWER)), FakeProcessor(max_model_len=4096))
    async with connect(server) as client:
        message = await client.messages.create(**ASK)
        calls = cast("Any", [block for block in message.content if block.type == "tool_use"])
        results = [
            {"type": "tool_result", "tool_use_id": call.id, "content": content}
            for call, content in zip(calls, ["18 °C", [{"type": "text", "text": "see"}, PICTURE]], strict=True)
        ]
        history = [*HI, {"role": "assistant", "content": message.content}]
        history.append({"role": "user", "content": [*results, {"type": "text", "text": "and?"}, PICTURE]})
        await client.messages.create(**(ASK | {"messages": history}))
    sent = server.processor.calls[1]["messages"]
    assert [m["role"] for m in sent] == ["user", "assistant", "tool", "tool", "user"]
    assert (sent[1]["reasoning_content"], sent[1]["content"]) == ("Two cities.", "Let me look.")
    assert [json.loads(c["function"]["arguments"]) for c in sent[1]["tool_calls"]] == [*map(json.loads, ARGUMENTS)]
    assert [m["tool_call_id"] for m in sent[2:4]] == [c.id for c in calls]
    assert sent[2]["content"] == "18 °C"
    shown = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    assert sent[3]["content"] == [{"type": "text", "text": "see"}, shown]
    assert sent[4]["content"] == [{"type": "text", "text": "and?"}, shown]


async def test_count_tokens_is_what_the_message_will_cost() -> None:
    async with connect(Server()) as client:
        counted = await client.messages.count_tokens(model="tiny", messages=HI, system="be kind", tools=TOOLS)
        message = await client.messages.create(model="tiny", messages=HI, system="be kind", tools=TOOLS, max_tokens=9)
    assert counted.input_tokens == message.usage.input_tokens == len("<system>be kind<user>hi")


@pytest.mark.parametrize(
    ("thinking", "expected"),
    [
        ({"type": "enabled", "budget_tokens": 1024}, True),
        ({"type": "adaptive"}, True),
        ({"type": "disabled"}, False),
        (None, None),
    ],
)
async def test_thinking(thinking: Any, expected: bool | None) -> None:
    server = Server()
    await server.post(URL, {"model": "tiny", "messages": HI, "max_tokens": 9, "thinking": thinking})
    assert server.processor.calls[0]["enable_thinking"] is expected


BAD = {"type": "base64", "media_type": "image/png;x", "data": "AA=="}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 4096}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
        ({"messages": [*HI, {"role": "assistant", "content": "I"}]}, "messages[1].role"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "file"}}]}]}, "messages[0].content[0].source"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": BAD}]}]}, "messages[0].content[0].source.media_type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "tool_result", "tool_use_id": "y"}]}]},
            "messages[0].content[1].tool_use_id",
        ),
        ({"system": [PICTURE]}, "system[0].type"),
        ({"temperature": 1.5}, "temperature"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"stop_sequences": ["x"] * 99}, "stop_sequences"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
        ({"tools": TOOLS * 200}, "tools"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
        ({"thinking": {"type": "some"}}, "thinking.type"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
    ],
)  # fmt: skip
async def test_bad_requests_name_the_field(fields: dict[str, Any], param: str) -> None:
    body = {"model": "tiny", "messages": HI, "max_tokens": 9} | fields
    response = await Server(processor=StrictProcessor()).post(URL, body)
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (400, "invalid_request_error"), error
    assert param in error["message"]
    assert "stop:" not in error["message"]
