"""What a client can get wrong, each with its status, the field named, OpenAI's shape, and a server that goes on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ernie_cluster.api.limits import ApiLimits
from tests.fakes import FakeProcessor
from tests.unit.api.client import CHAT_URL, COMPLETION_URL, Connection, Server, chat_body

pytestmark = pytest.mark.anyio

LIMITS = ApiLimits(
    max_body_bytes=20_000,
    max_json_items=2000,
    max_messages=4,
    max_prompts=3,
    max_tools=2,
    max_n=3,
    max_grammar_bytes=5000,
)


def content(value: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": value}]}


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": function}


def schema_format(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}}


def answered(call_id: str | None) -> dict[str, Any]:
    """A conversation in which a tool answers `call_id`, where `call_1` was asked."""
    call = {"id": "call_1", **tool(name="f", arguments="{}")}
    return {
        "messages": [
            {"role": "user", "content": "x"},
            {"role": "assistant", "tool_calls": [call, tool(name="f", arguments="{}")]},
            {"role": "tool", "content": "y", "tool_call_id": call_id},
        ]
    }


CHAT = [  # fields that differ from a good body, status, param
    ({"model": None}, 400, "model"),
    ({"model": 7}, 400, "model"),
    ({"model": ""}, 404, "model"),
    ({"model": "gpt-none"}, 404, "model"),
    ({"model": "m" * 5000}, 404, "model"),
    ({"messages": None}, 400, "messages"),
    ({"messages": []}, 400, "messages"),
    ({"messages": "hi"}, 400, "messages"),
    ({"messages": ["hi"]}, 400, "messages[0]"),
    ({"messages": [{"role": "user", "content": "x"}] * 5}, 400, "messages"),
    ({"messages": [{"content": "x"}]}, 400, "messages[0].role"),
    ({"messages": [{"role": "root", "content": "x"}]}, 400, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, 400, "messages[0].content"),
    ({"messages": [{"role": "assistant", "content": None}]}, 400, "messages[0].content"),
    (content(5), 400, "messages[0].content"),
    (content({}), 400, "messages[0].content"),
    (content([]), 400, "messages[0].content"),
    (content(["x"]), 400, "messages[0].content[0]"),
    (content([{"text": "x"}]), 400, "messages[0].content[0]"),
    (content([{"type": "audio"}]), 400, "messages[0].content[0]"),
    (content([{"type": ["text"]}]), 400, "messages[0].content[0]"),
    (content([{"type": "text", "text": 1}]), 400, "messages[0].content[0].text"),
    (content([{"type": "text", "text": "a"}, {"type": "text"}]), 400, "messages[0].content[1].text"),
    (content([{"type": "image_url"}]), 400, "messages[0].content[0].image_url"),
    (content([{"type": "image_url", "image_url": "data:,"}]), 400, "messages[0].content[0].image_url"),
    (content([{"type": "image_url", "image_url": {}}]), 400, "messages[0].content[0].image_url.url"),
    (content([{"type": "image_url", "image_url": {"url": "http://10.0.0.1/"}}]), 400, "messages[0].content[0].image_url.url"),
    (content([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]), 400, "messages[0].content[0].image_url.url"),
    (content([{"type": "video_url"}]), 400, "messages[0].content[0].video_url"),
    (content([{"type": "video_url", "video_url": {"url": "http://10.0.0.1/"}}]), 400, "messages[0].content[0].video_url.url"),
    (content([{"type": "video_url", "video_url": {"url": "data:,", "fps": "2"}}]), 400, "messages[0].content[0].video_url.fps"),
    (content([{"type": "video_url", "video_url": {"url": "data:,", "fps": float("nan")}}]), 400, "messages[0].content[0].video_url.fps"),
    (content([{"type": "video_url", "video_url": {"url": "data:,", "max_frames": 2.5}}]), 400, "messages[0].content[0].video_url.max_frames"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"type": "function", "function": "f"}]}]}, 400, "messages[0].tool_calls[0].function"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": -1}, 400, "max_tokens"),
    ({"max_tokens": 1.5}, 400, "max_tokens"),
    ({"max_tokens": "16"}, 400, "max_tokens"),
    ({"max_tokens": True}, 400, "max_tokens"),
    ({"max_tokens": 513}, 400, "max_tokens"),
    ({"max_tokens": 10**100}, 400, "max_tokens"),
    ({"max_completion_tokens": 0}, 400, "max_completion_tokens"),
    ({"max_completion_tokens": 10**6, "max_tokens": 1}, 400, "max_completion_tokens"),
    (content("x" * 600), 400, "messages"),
    (content("x" * 506), 400, "messages"),  # "<user>" and these leave no token for an answer
    ({"min_tokens": -1}, 400, "min_tokens"),
    ({"min_tokens": 9, "max_tokens": 8}, 400, "min_tokens"),
    ({"temperature": -0.1}, 400, "temperature"),
    ({"temperature": 2.1}, 400, "temperature"),
    ({"temperature": "1"}, 400, "temperature"),
    ({"temperature": True}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"top_p": 1.01}, 400, "top_p"),
    ({"top_k": -2}, 400, "top_k"),
    ({"top_k": 2.5}, 400, "top_k"),
    ({"min_p": 1.1}, 400, "min_p"),
    ({"repetition_penalty": 0}, 400, "repetition_penalty"),
    ({"presence_penalty": 2.5}, 400, "presence_penalty"),
    ({"frequency_penalty": -2.5}, 400, "frequency_penalty"),
    ({"logit_bias": [1]}, 400, "logit_bias"),
    ({"logit_bias": {"x": 1}}, 400, "logit_bias.x"),
    ({"logit_bias": {"-1": 1}}, 400, "logit_bias.-1"),
    ({"logit_bias": {"٣": 1}}, 400, "logit_bias.٣"),
    ({"logit_bias": {"1": 101}}, 400, "logit_bias.1"),
    ({"logit_bias": {"257": 1}}, 400, "logit_bias"),
    ({"seed": "1"}, 400, "seed"),
    ({"seed": 2**63}, 400, "seed"),
    ({"stop": ""}, 400, "stop[0]"),
    ({"stop": 5}, 400, "stop"),
    ({"stop": ["a", 5]}, 400, "stop[1]"),
    ({"stop": ["a"] * 17}, 400, "stop"),
    ({"stop": "x" * 257}, 400, "stop[0]"),
    ({"stop_token_ids": [-1]}, 400, "stop_token_ids[0]"),
    ({"stop_token_ids": [257]}, 400, "stop_token_ids"),
    ({"stop_token_ids": [1] * 65}, 400, "stop_token_ids"),
    ({"n": 0}, 400, "n"),
    ({"n": 4}, 400, "n"),
    ({"n": True}, 400, "n"),
    ({"stream": "yes"}, 400, "stream"),
    ({"cache_salt": ""}, 400, "cache_salt"),
    ({"cache_salt": 1}, 400, "cache_salt"),
    ({"cache_salt": "x" * 1025}, 400, "cache_salt"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, 400, "stream_options.include_usage"),
    ({"ignore_eos": 1}, 400, "ignore_eos"),
    ({"user": 1}, 400, "user"),
    ({"chat_template_kwargs": {"enable_thinking": "no"}}, 400, "chat_template_kwargs.enable_thinking"),
    ({"include_timeline": 1}, 400, "include_timeline"),
    ({"tools": {}}, 400, "tools"),
    ({"tools": [tool(name="f")] * 3}, 400, "tools"),
    ({"tools": [tool()]}, 400, "tools[0].function.name"),
    ({"tool_choice": "required"}, 400, "tool_choice"),
    ({"tool_choice": "must"}, 400, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {}}}, 400, "tool_choice.function.name"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, 400, "tool_choice.function.name"),
    ({"tool_choice": "required", "tools": [tool(name="f", parameters={"type": "array"})]}, 400, "tools[0].function.parameters"),
    ({"tool_choice": "required", "tools": [tool(name="f", parameters={"not": {}})]}, 400, "tools"),
    ({"parallel_tool_calls": 0}, 400, "parallel_tool_calls"),
    ({"reasoning_effort": "huge"}, 400, "reasoning_effort"),
    ({"enable_thinking": "no"}, 400, "enable_thinking"),
    (answered(None), 400, "messages[2].tool_call_id"),
    (answered("call_2"), 400, "messages[2].tool_call_id"),
    ({"messages": answered("call_1")["messages"][2:]}, 400, "messages[0].tool_call_id"),
    ({"logprobs": 1}, 400, "logprobs"),
    ({"top_logprobs": 3}, 400, "top_logprobs"),
    ({"logprobs": False, "top_logprobs": 3}, 400, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, 400, "top_logprobs"),
    ({"response_format": "json_object"}, 400, "response_format"),
    ({"response_format": {"type": "xml"}}, 400, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, 400, "response_format.json_schema"),
    (schema_format("x"), 400, "response_format.json_schema.schema"),
    (schema_format({"type": "foo"}), 400, "response_format.json_schema.schema"),
    (schema_format({"enum": ["x" * 999] * 9}), 400, "response_format.json_schema.schema"),
    (schema_format({"type": "integer", "multipleOf": 999_983}), 400, "response_format.json_schema.schema"),
    ({"guided_json": "{"}, 400, "guided_json"),
    ({"guided_json": [1]}, 400, "guided_json"),
    ({"guided_json": "[" * 1500}, 400, "guided_json"),
    ({"guided_regex": ""}, 400, "guided_regex"),
    ({"guided_regex": "(a"}, 400, "guided_regex"),
    ({"guided_choice": []}, 400, "guided_choice"),
    ({"guided_choice": ["a", ""]}, 400, "guided_choice[1]"),
    ({"guided_grammar": "start: a"}, 400, "guided_grammar"),
    ({"structured_outputs": {"grammar": "start: a"}}, 400, "structured_outputs.grammar"),
    ({"structured_outputs": {"regex": "(a"}}, 400, "structured_outputs.regex"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, 400, "guided_choice"),
    ({"response_format": {"type": "json_object"}, "guided_json": {}}, 400, "guided_json"),
    ({"functions": [{}]}, 400, "functions"),
]  # fmt: skip

COMPLETION = [
    ({"prompt": None}, 400, "prompt"),
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": []}, 400, "prompt"),
    ({"prompt": 5}, 400, "prompt"),
    ({"prompt": [""]}, 400, "prompt[0]"),
    ({"prompt": ["a", []]}, 400, "prompt[1]"),
    ({"prompt": ["a", {}]}, 400, "prompt[1]"),
    ({"prompt": [1, "a"]}, 400, "prompt[0]"),
    ({"prompt": [1, True]}, 400, "prompt[0]"),
    ({"prompt": [1.5]}, 400, "prompt[0]"),
    ({"prompt": [257]}, 400, "prompt"),
    ({"prompt": [-1]}, 400, "prompt"),
    ({"prompt": ["a"] * 4}, 400, "prompt"),
    ({"prompt": "x" * 512}, 400, "prompt"),
    ({"prompt": "x" * 513}, 400, "prompt"),
    ({"echo": True}, 400, "echo"),
    ({"suffix": "x"}, 400, "suffix"),
    ({"best_of": 2}, 400, "best_of"),
    ({"logprobs": 6}, 400, "logprobs"),
    ({"logprobs": -1}, 400, "logprobs"),
    ({"logprobs": True}, 400, "logprobs"),
]

RAW = [  # body, status
    (b"", 400),
    (b"{", 400),
    (b"[]", 400),
    (b"null", 400),
    (b"\xff\xfe", 400),
    (b'{"model": "tiny"} {}', 400),
    (b'{"seed": ' + b"9" * 6000 + b"}", 400),
    (b'{"user": "\\ud800"}', 400),
    (b'{"x": ' + b"[" * 33 + b"]" * 33 + b"}", 400),
    (b'{"x": ' + b"[" * 900 + b"]" * 900 + b"}", 400),
    (b'{"x": [' + b"1," * 2000 + b"1]}", 400),
    (b'{"x": "' + b"y" * 20_000 + b'"}', 413),
]


async def check(server: Server, url: str, body: Any, status: int, param: str | None, **headers: str) -> None:
    response = await server.post(url, body, headers)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert response.json().keys() == {"error"}
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert 0 < len(error["message"]) < 400
    assert server.backend.requests == []
    assert (await server.chat()).json()["choices"][0]["message"]["content"] == "Hello"


@pytest.mark.parametrize(("fields", "status", "param"), CHAT)
async def test_chat(fields: dict[str, Any], status: int, param: str) -> None:
    await check(Server(limits=LIMITS), CHAT_URL, chat_body(**fields), status, param)


@pytest.mark.parametrize(("fields", "status", "param"), COMPLETION)
async def test_completion(fields: dict[str, Any], status: int, param: str) -> None:
    await check(Server(limits=LIMITS), COMPLETION_URL, {"model": "tiny", "prompt": "p", **fields}, status, param)


@pytest.mark.parametrize(("body", "status"), RAW)
async def test_body(body: bytes, status: int) -> None:
    await check(Server(limits=LIMITS), CHAT_URL, body, status, None)


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"1e400"])
async def test_not_a_number(number: bytes) -> None:
    body = b'{"model": "tiny", "prompt": "p", "temperature": ' + number + b"}"
    await check(Server(limits=LIMITS), COMPLETION_URL, body, 400, "temperature")


@pytest.mark.parametrize("name", ["model", "messages"])
async def test_a_missing_field_is_named(name: str) -> None:
    body = chat_body()
    del body[name]
    await check(Server(limits=LIMITS), CHAT_URL, body, 400, name)


@pytest.mark.parametrize(
    ("header", "value", "status"),
    [
        ("content-type", "text/plain", 415),
        ("content-type", "", 415),
        ("content-encoding", "gzip", 415),
        ("content-length", "20001", 413),
        ("content-length", "9" * 30, 413),
        ("content-length", "-1", 413),
    ],
)
async def test_headers(header: str, value: str, status: int) -> None:
    await check(Server(limits=LIMITS), CHAT_URL, chat_body(), status, None, **{header: value})


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
