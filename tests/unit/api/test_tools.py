"""Thinking and tools as the official client sees them, whole and streamed."""

from __future__ import annotations

import asyncio
import json
from typing import Any, cast

import pytest

from tests.fakes import FakeBackend, FakeProcessor, say
from tests.unit.api.client import Connection, Server, chat_body
from tests.unit.api.test_openai_client import connect

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

MESSAGES = cast("Any", [{"role": "user", "content": "Is it warm in Kyiv and Ulm?"}])
TOOLS = cast("Any", [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}])
ARGUMENTS = ['{"city": "Kyiv", "days": [1, 2]}', '{"city": "Ulm 🙂"}']
CALLS = "".join(
    f'<tool_call>\n{{"name": "weather", "arguments": {arguments}}}\n</tool_call>\n' for arguments in ARGUMENTS
)
ANSWER = f"Two cities.\n</think>\n\nLet me look.\n\n{CALLS}"
THINK = {"chat_template_kwargs": {"enable_thinking": True}}


@pytest.mark.parametrize("tokens_per_step", [1, 7, 1000])
async def test_calls_whole(tokens_per_step: int) -> None:
    server = Server(FakeBackend(say(ANSWER, tokens_per_step)))
    async with connect(server) as client:
        answer = await client.chat.completions.create(model="tiny", messages=MESSAGES, tools=TOOLS, extra_body=THINK)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me look."
    assert cast("Any", choice.message).reasoning_content == "Two cities."
    calls = cast("Any", choice.message.tool_calls)
    assert [(c.type, c.function.name, c.function.arguments) for c in calls] == [
        ("function", "weather", arguments) for arguments in ARGUMENTS
    ]
    assert len({c.id for c in calls}) == 2
    assert all(c.id.startswith("call_") for c in calls)
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens == len("Two cities.\n</think>")
    assert answer.usage.completion_tokens == len(ANSWER.encode()) + 1


async def test_calls_streamed_are_the_same() -> None:
    server = Server(FakeBackend(say(ANSWER, 3)))
    async with connect(server) as client:
        stream = await client.chat.completions.create(
            model="tiny", messages=MESSAGES, tools=TOOLS, extra_body=THINK, stream=True
        )
        choices = [chunk.choices[0] async for chunk in stream]
    assert [c.finish_reason for c in choices] == [None] * (len(choices) - 1) + ["tool_calls"]
    deltas = [c.delta for c in choices]
    assert "".join(d.content or "" for d in deltas) == "Let me look."
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == "Two cities."
    pieces = [call for d in deltas for call in d.tool_calls or []]
    for i, arguments in enumerate(ARGUMENTS):
        first, *later = [p for p in pieces if p.index == i]
        assert (first.type, cast("Any", first.function).name) == ("function", "weather")
        assert all(p.id is None and p.function and p.function.name is None for p in later)
        assert "".join(p.function.arguments or "" for p in [first, *later] if p.function) == arguments


async def test_the_client_s_own_accumulator_understands_the_stream() -> None:
    async with (
        connect(Server(FakeBackend(say(ANSWER, 3)))) as client,
        client.chat.completions.stream(model="tiny", messages=MESSAGES, tools=TOOLS, extra_body=THINK) as stream,
    ):
        completion = await stream.get_final_completion()
    (choice,) = completion.choices
    assert choice.message.content == "Let me look."
    assert [c.function.arguments for c in choice.message.tool_calls or []] == ARGUMENTS


async def test_arguments_leave_before_the_call_is_complete() -> None:
    head, tail = '<tool_call>{"name": "weather", "arguments": {"city": "Ky', 'iv"}}</tool_call>'
    gate = asyncio.Event()
    backend = FakeBackend([*say(head, 100, None), gate, *say(tail, 100)])
    connection = Connection(Server(backend).app, json.dumps(chat_body(tools=TOOLS, stream=True)).encode())
    assert (await connection.message())["status"] == 200
    (event,) = await connection.events()
    (call,) = event["choices"][0]["delta"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Ky'}
    gate.set()
    (event, *_) = await connection.events()
    (call,) = event["choices"][0]["delta"]["tool_calls"]
    assert call == {"index": 0, "function": {"arguments": 'iv"}'}}
    await connection.task


async def test_only_calls_leave_content_null_and_choices_have_their_own_ids() -> None:
    choices = (await Server(FakeBackend(say(CALLS))).chat(tools=TOOLS, n=2)).json()["choices"]
    assert [c["message"]["content"] for c in choices] == [None, None]
    assert len({call["id"] for c in choices for call in c["message"]["tool_calls"]}) == 4


@pytest.mark.parametrize("fields", [{}, {"tools": []}, {"tools": TOOLS, "tool_choice": "none"}])
async def test_a_call_is_text_where_no_tool_was_offered(fields: dict[str, Any]) -> None:
    server = Server(FakeBackend(say(CALLS)))
    choice = (await server.chat(**fields)).json()["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": CALLS, "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert server.processor.calls[0]["tools"] is None


async def test_a_call_cut_off_by_max_tokens() -> None:
    cut = CALLS.index("Kyiv") + 2
    choice = (await Server(FakeBackend(say(CALLS))).chat(tools=TOOLS, max_tokens=cut)).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Ky'


async def test_completions_are_raw_text() -> None:
    text = f"<think>a</think>\n{CALLS}"
    assert (await Server(FakeBackend(say(text))).complete()).json()["choices"][0]["text"] == text


@pytest.mark.parametrize(
    ("fields", "thinking"),
    [
        ({}, None),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "minimal"}, False),
        ({"reasoning_effort": "low"}, True),
        ({"reasoning_effort": "high"}, True),
        ({"enable_thinking": True}, True),
        ({"enable_thinking": False, "reasoning_effort": "high"}, False),
        ({"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"enable_thinking": True, "chat_template_kwargs": {}}, True),
    ],
)
async def test_ways_to_ask_for_thinking(fields: dict[str, Any], thinking: bool | None) -> None:
    server = Server(FakeBackend(say("why</think>yes")))
    message = (await server.chat(**fields)).json()["choices"][0]["message"]
    assert server.processor.calls[0]["enable_thinking"] is thinking
    if thinking:
        assert (message["reasoning_content"], message["content"]) == ("why", "yes")
    else:
        assert (message.get("reasoning_content"), message["content"]) == (None, "why</think>yes")


async def test_an_unfinished_thought_is_no_content() -> None:
    choice = (await Server(FakeBackend(say("hmm, so"))).chat(**THINK, max_tokens=3)).json()["choices"][0]
    assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == ("hmm", "")
    assert choice["finish_reason"] == "length"


async def test_an_answer_with_calls_can_be_sent_back() -> None:
    server = Server(FakeBackend(say(ANSWER)), FakeProcessor(max_model_len=4096))
    message = (await server.chat(**THINK, tools=TOOLS)).json()["choices"][0]["message"]
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    results: list[Any] = ["18 °C", [{"type": "text", "text": "see"}, picture]]
    history = [
        *chat_body()["messages"],
        message,
        *(
            {"role": "tool", "tool_call_id": call["id"], "content": result}
            for call, result in zip(message["tool_calls"], results, strict=True)
        ),
    ]
    response = await server.chat(messages=history, tools=TOOLS)
    assert response.status_code == 200, response.text
    sent = server.processor.calls[1]["messages"]
    assert sent[1]["reasoning_content"] == "Two cities."
    assert [json.loads(c["function"]["arguments"]) for c in sent[1]["tool_calls"]] == [*map(json.loads, ARGUMENTS)]
    assert [m["content"] for m in sent[2:]] == results
