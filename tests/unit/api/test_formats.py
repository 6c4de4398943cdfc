"""Answers whose form is bound: which grammar reaches the engine, and that the calls it lets through are read back."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from ernie_cluster.api import constraints
from tests.fakes import FakeBackend, say
from tests.unit.api.client import Server, events_of
from tests.unit.api.test_tools import ANSWER, ARGUMENTS, CALLS, THINK
from tests.unit.grammar.test_write import accepts

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(180)]

SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
GOOD, BAD = '{"age": 3}', '{"age": "x"}'
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "time"}},
]
WEATHER, TIME = (
    f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
    for name, arguments in (("weather", '{"city": "Ulm"}'), ("time", "{}"))
)


async def grammar_of(is_chat: bool = True, **fields: Any) -> str:
    server = Server(FakeBackend(say("{}")))
    response = await (server.chat(**fields) if is_chat else server.complete(**fields))
    assert response.status_code == 200, response.text
    return server.backend.requests[0].sampling.grammar


@pytest.mark.parametrize("is_chat", [True, False])
@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        ({"response_format": {"type": "json_object"}}, BAD, "[1]"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}}, GOOD, BAD),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}}, "[1]", "x"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "strict": True}}}, BAD, "[1]"),
        ({"guided_json": SCHEMA}, GOOD, BAD),
        ({"guided_json": json.dumps(SCHEMA)}, GOOD, BAD),
        ({"guided_regex": "[a-z]+/x"}, "ab/x", "ab"),
        ({"guided_choice": ["yes", "no"]}, "no", "nope"),
        ({"structured_outputs": {"json": SCHEMA}}, GOOD, BAD),
        ({"structured_outputs": {"regex": "^[a-z]+/x$"}}, "ab/x", "ab"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "no", "nope"),
        ({"structured_outputs": {"json_object": True}}, BAD, "[1]"),
    ],
)
async def test_formats(fields: dict[str, Any], good: str, bad: str, is_chat: bool) -> None:
    grammar = await grammar_of(is_chat, **fields)
    assert accepts(grammar, good)
    assert not accepts(grammar, bad)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": {"type": "text"}},
        {"response_format": None, "guided_json": None, "structured_outputs": {}},
        {"structured_outputs": {"json_object": False}},
        {"tools": TOOLS, "tool_choice": "auto"},
        {"tools": TOOLS, "parallel_tool_calls": False},
    ],
)
async def test_nothing_is_bound_unasked(fields: dict[str, Any]) -> None:
    assert await grammar_of(**fields) == ""


async def test_thinking_stays_free() -> None:
    grammar = await grammar_of(guided_choice=["yes"], **THINK)
    assert accepts(grammar, "Is it?\n</think>\n\nyes")
    assert not accepts(grammar, "Is it?\n</think>\n\nno")
    assert not accepts(grammar, "yes")


@pytest.mark.parametrize(
    ("fields", "right", "wrong"),
    [
        ({"tool_choice": "required"}, [WEATHER, TIME, f"{WEATHER}\n{TIME}"], ["", "hi", GOOD, WEATHER.replace("city", "town")]),
        ({"tool_choice": "required", "parallel_tool_calls": False}, [WEATHER, TIME], [f"{WEATHER}\n{TIME}"]),
        ({"tool_choice": {"type": "function", "function": {"name": "time"}}}, [TIME], [WEATHER, TIME.replace("{}", '{"x": 1}')]),
        ({"guided_json": SCHEMA}, [GOOD, WEATHER], [BAD, "hi", f"{GOOD}\n{WEATHER}"]),
        ({"guided_json": SCHEMA, "tool_choice": "none"}, [GOOD], [BAD, WEATHER]),
        ({"guided_json": SCHEMA, "tool_choice": "required"}, [WEATHER], [GOOD]),
    ],
)  # fmt: skip
async def test_tools(fields: dict[str, Any], right: list[str], wrong: list[str]) -> None:
    grammar = await grammar_of(tools=TOOLS, **fields)
    assert [text for text in right if not accepts(grammar, text)] == []
    assert [text for text in wrong if accepts(grammar, text)] == []


async def test_a_forced_call_is_read_back() -> None:
    fields = {"tools": TOOLS, "tool_choice": "required"}
    text = f"{WEATHER}\n{TIME}"
    assert accepts(await grammar_of(**fields), text)
    choice = (await Server(FakeBackend(say(text))).chat(**fields)).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    calls = [call["function"] for call in choice["message"]["tool_calls"]]
    assert calls == [{"name": "weather", "arguments": '{"city": "Ulm"}'}, {"name": "time", "arguments": "{}"}]


@pytest.mark.parametrize("tokens_per_step", [1, 9, 1000])
async def test_at_most_one_call(tokens_per_step: int) -> None:
    server = Server(FakeBackend(say(ANSWER + "and more", tokens_per_step)))
    fields = {"tools": TOOLS, "parallel_tool_calls": False, **THINK}
    choice = (await server.chat(**fields)).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me look."
    assert [call["function"]["arguments"] for call in choice["message"]["tool_calls"]] == ARGUMENTS[:1]
    assert len(server.backend.aborted) == 1
    events = events_of((await Server(FakeBackend(say(ANSWER, tokens_per_step))).chat(**fields, stream=True)).text)
    deltas = [event["choices"][0]["delta"] for event in events if event != "[DONE]"]
    pieces = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert {piece["index"] for piece in pieces} == {0}
    assert "".join(piece["function"]["arguments"] for piece in pieces) == ARGUMENTS[0]


async def test_one_call_that_cannot_stream_is_one_call_too() -> None:
    """Its arguments come before its name."""
    odd = '<tool_call>{"arguments": {"city": "Ulm"}, "name": "weather"}</tool_call>'
    server = Server(FakeBackend(say(odd + CALLS)))
    message = (await server.chat(tools=TOOLS, parallel_tool_calls=False)).json()["choices"][0]["message"]
    assert [call["function"]["arguments"] for call in message["tool_calls"]] == ['{"city": "Ulm"}']


async def test_a_small_body_with_a_format_does_not_hold_up_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trying a grammar takes a while, so it goes to a thread, however small the body is."""
    threads: list[str] = []
    monkeypatch.setattr(constraints, "check", lambda _: threads.append(threading.current_thread().name))
    assert (await Server().chat(guided_choice=["a"])).status_code == 200
    assert [name.startswith("preprocess") for name in threads] == [True]
