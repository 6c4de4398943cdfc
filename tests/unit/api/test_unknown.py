"""`x-strict: true`: fields that nobody reads are told, wherever they stand and whatever they are called."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest

from ernie_cluster.api.dialect import Dialect
from ernie_cluster.api.http_service import DIALECTS
from ernie_cluster.api.unknown import refuse_unknown
from ernie_cluster.errors import InvalidRequest
from tests.fakes import FakeBackend, say
from tests.unit.api.client import CHAT_URL, COMPLETION_URL, Server
from tests.unit.api.test_tools import ANSWER

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

# Everywhere

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
PICTURE = "data:image/png;base64,AA=="
RICH: dict[str, dict[str, Any]] = {
    CHAT_URL: {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "s"},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "t"},
                    {"type": "image_url", "image_url": {"url": PICTURE}},
                    {"type": "video_url", "video_url": {"url": PICTURE, "fps": 1.0}},
                ],
            },
            {
                "role": "assistant",
                "reasoning_content": "r",
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "1", "content": "y"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "stream": True,
        "stream_options": {"include_usage": True},
        "chat_template_kwargs": {"enable_thinking": True},
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
        "logit_bias": {"1": 1},
    },
    COMPLETION_URL: {"model": "tiny", "prompt": [[1, 2], "a"], "guided_json": SCHEMA},
    "/v1/responses": {
        "model": "tiny",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "t"}, {"type": "input_image", "image_url": PICTURE}]},
            {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "r"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "o"}]},
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "y"},
        ],
        "tools": [{"type": "function", "name": "f", "parameters": SCHEMA}],
        "tool_choice": {"type": "function", "name": "f"},
        "reasoning": {"effort": "low"},
        "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}},
        "metadata": {"a": "b"},
    },
    "/v1/messages": {
        "model": "tiny",
        "max_tokens": 4,
        "system": [{"type": "text", "text": "s"}],
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "t"},
                    {"type": "image", "source": {"type": "url", "url": PICTURE}},
                ],
            },
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "r"},
                    {"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1}},
                ],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "y"}]}]},
        ],
        "tools": [{"name": "f", "input_schema": SCHEMA}],
        "tool_choice": {"type": "tool", "name": "f"},
        "thinking": {"type": "enabled", "budget_tokens": 5},
        "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
        "metadata": {"user_id": "u"},
    },
}  # fmt: skip
FREE = {"schema", "parameters", "input_schema", "guided_json", "logit_bias", "input"}
"""Objects whose fields are the client's own; `input` and `metadata` are such in one API, and not in the other."""


def places(value: Any, path: tuple[int | str, ...] = ()) -> Iterator[tuple[int | str, ...]]:
    """Paths of all objects whose fields are ours to know."""
    if isinstance(value, dict) and not (path and path[-1] in FREE) and value != {"a": "b"}:
        yield path
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from places(inner, (*path, i))


PLACES = [(url, path) for url, body in RICH.items() for path in places(body)]


@pytest.mark.parametrize("url", RICH)
def test_a_body_of_known_fields_passes(url: str) -> None:
    refuse_unknown(DIALECTS[url].body_type, RICH[url])


@pytest.mark.parametrize(("url", "path"), PLACES)
def test_an_unknown_field_is_found_wherever_it_stands(url: str, path: tuple[int | str, ...]) -> None:
    body, dialect = copy.deepcopy(RICH[url]), DIALECTS[url]
    place: Any = body
    for part in path:
        place = place[part]
    misspelled = f"{max(place, key=len)}x"
    place[misspelled] = None
    assert_found(dialect, body, misspelled, meant=misspelled[:-1])
    place["zzqq"] = place.pop(misspelled)
    assert_found(dialect, body, "zzqq", meant="")


def assert_found(dialect: Dialect, body: dict[str, Any], name: str, meant: str) -> None:
    dialect.read(body)  # without the header nobody minds
    with pytest.raises(InvalidRequest) as info:
        refuse_unknown(dialect.body_type, body)
    assert (info.value.param or "").split(".")[-1] == name
    assert str(info.value).endswith(f"did you mean {meant}?" if meant else "leave it out")


# Over HTTP

STRICT = {"x-strict": "true"}
HI = {"role": "user", "content": "hi"}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [HI]}
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "whatever": 1}, "descripton": ""},
}
UNKNOWN: list[tuple[str, dict[str, Any], str, str]] = [
    (CHAT_URL, CHAT | {"temprature": 1}, "temprature", "temperature"),
    (CHAT_URL, CHAT | {"max_thinking_token": 1}, "max_thinking_token", "max_thinking_tokens"),
    (CHAT_URL, CHAT | {"zzz": None}, "zzz", ""),
    (CHAT_URL, CHAT | {"messages": [HI, HI | {"contents": 1}]}, "messages[1].contents", "content"),
    (
        CHAT_URL,
        CHAT | {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "txt": ""}]}]},
        "messages[0].content[0].txt",
        "text",
    ),
    (CHAT_URL, CHAT | {"tools": [TOOL]}, "tools[0].function.descripton", "description"),
    (
        CHAT_URL,
        CHAT | {"stream": True, "stream_options": {"includeusage": True}},
        "stream_options.includeusage",
        "include_usage",
    ),
    (COMPLETION_URL, {"model": "tiny", "prompt": "a", "promt": "b"}, "promt", "prompt"),
    ("/v1/responses", {"model": "tiny", "input": "a", "instruction": "b"}, "instruction", "instructions"),
    ("/v1/messages", CHAT | {"max_tokens": 4, "stop_sequence": []}, "stop_sequence", "stop_sequences"),
    (
        "/v1/messages",
        CHAT | {"max_tokens": 4, "output_config": {"format": {"type": "json_schema", "schema": {}, "schem": 1}}},
        "output_config.format.schem",
        "schema",
    ),
]


@pytest.mark.parametrize(("url", "body", "param", "meant"), UNKNOWN)
async def test_an_unknown_field_is_named_to_those_who_ask_for_it(
    url: str, body: dict[str, Any], param: str, meant: str
) -> None:
    server = Server()
    assert (await server.post(url, body)).status_code == 200
    assert (await server.post(url, body, {"x-strict": "false"})).status_code == 200
    response = await server.post(url, body, STRICT)
    assert response.status_code == 400
    error = response.json()["error"]
    assert param in error["message"]
    assert error["message"].endswith(f"did you mean {meant}?" if meant else "leave it out")
    if not url.endswith("messages"):
        assert (error["param"], error["code"]) == (param, "unknown_parameter")


async def test_known_fields_pass_in_every_spelling() -> None:
    body = CHAT | {
        "thinking_token_budget": 3,
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
        "chat_template_kwargs": {"enable_thinking": True},
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "x": 1}}}],
    }
    response = await Server(FakeBackend(say("</think>{}"))).post(CHAT_URL, body, STRICT)
    assert response.status_code == 200, response.text


async def test_a_strictness_that_is_none_is_refused() -> None:
    response = await Server().post(CHAT_URL, CHAT, {"x-strict": "yes"})
    assert response.status_code == 400
    assert "x-strict" in response.json()["error"]["message"]


async def test_what_is_wrong_comes_before_what_is_unknown() -> None:
    response = await Server().post(CHAT_URL, CHAT | {"zzz": 1, "n": 0}, STRICT)
    assert response.json()["error"]["param"] == "n"


async def test_what_was_answered_here_may_come_back() -> None:
    """A thought, words and a call: nothing in them is unknown, though not all of it is read."""
    server = Server(FakeBackend(say(ANSWER)))
    asked = {"role": "user", "content": "hi"}

    async def ask(url: str, **fields: Any) -> dict[str, Any]:
        response = await server.post(url, {"model": "tiny", **fields}, STRICT)
        assert response.status_code == 200, response.text
        answered: dict[str, Any] = response.json()
        return answered

    chat: dict[str, Any] = {"tools": [{"type": "function", "function": {"name": "weather"}}], "enable_thinking": True}
    message = (await ask(CHAT_URL, messages=[asked], **chat))["choices"][0]["message"]
    assert message["tool_calls"]
    assert message["reasoning_content"]
    await ask(CHAT_URL, messages=[asked, message, asked], **chat)

    responses: dict[str, Any] = {"tools": [{"type": "function", "name": "weather"}], "reasoning": {"effort": "low"}}
    output = (await ask("/v1/responses", input=[asked], **responses))["output"]
    assert {item["type"] for item in output} == {"reasoning", "message", "function_call"}
    await ask("/v1/responses", input=[asked, *output, asked], **responses)

    messages: dict[str, Any] = {"max_tokens": 300, "tools": [{"name": "weather", "input_schema": {"type": "object"}}]}
    messages["thinking"] = {"type": "enabled"}
    content = (await ask("/v1/messages", messages=[asked], **messages))["content"]
    assert {block["type"] for block in content} == {"thinking", "text", "tool_use"}
    await ask("/v1/messages", messages=[asked, {"role": "assistant", "content": content}, asked], **messages)
