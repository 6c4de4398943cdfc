"""Every dialect is a translation: what it accepts gives the prompt of the chat request that says the same."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_cluster.api.anthropic import MESSAGES
from ernie_cluster.api.openai import CHAT
from ernie_cluster.api.responses import RESPONSES
from ernie_cluster.api.schemas import GenerationBody
from ernie_cluster.api.translate import renamed
from ernie_cluster.errors import ContextTooLong, InvalidRequest

WORDS = st.text("ab<{🙂\n", max_size=6)
OBJECTS = st.dictionaries(st.text('xy"', max_size=2), st.integers() | WORDS, max_size=2)
PARTS = st.lists(st.tuples(st.sampled_from(["text", "image"]), WORDS), min_size=1, max_size=3)
TURNS = st.tuples(WORDS, st.none() | WORDS, st.lists(st.tuples(OBJECTS, WORDS | PARTS), max_size=3))
"""What the assistant says and thinks, and the arguments and results of its calls."""
CONVERSATIONS = st.tuples(
    st.none() | WORDS.filter(bool), st.lists(st.tuples(WORDS | PARTS, TURNS), max_size=3), WORDS | PARTS
)
"""What the application says, user and assistant in turn, and what the user says last."""
TOOLS = st.lists(st.tuples(st.sampled_from(["f", "g"]), st.none() | WORDS, OBJECTS), max_size=2)
IMAGE = "data:image/png;base64,AA=="


def dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def chat_request(system: str | None, turns: Any, last: Any, tools: Any, thinking: bool | None) -> dict[str, Any]:
    def content(said: Any) -> Any:
        if isinstance(said, str):
            return said
        image = {"type": "image_url", "image_url": {"url": IMAGE}}
        return [image if kind == "image" else {"type": "text", "text": text} for kind, text in said]

    messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    for i, (asked, (said, thought, calls)) in enumerate(turns):
        messages.append({"role": "user", "content": content(asked)})
        turn: dict[str, Any] = {"role": "assistant", "content": said}
        if thought:
            turn["reasoning_content"] = thought
        if calls:
            turn["tool_calls"] = [
                {"id": f"{i}.{k}", "type": "function", "function": {"name": "f", "arguments": dumped(arguments)}}
                for k, (arguments, _) in enumerate(calls)
            ]
        messages.append(turn)
        messages += [
            {"role": "tool", "tool_call_id": f"{i}.{k}", "content": content(result)}
            for k, (_, result) in enumerate(calls)
        ]
    messages.append({"role": "user", "content": content(last)})
    functions = [
        {"name": name, **({} if text is None else {"description": text}), "parameters": parameters}
        for name, text, parameters in tools
    ]
    return {
        "model": "tiny",
        "messages": messages,
        "tools": [{"type": "function", "function": function} for function in functions],
        "enable_thinking": thinking,
        "max_completion_tokens": 7,
    }


def responses_request(system: str | None, turns: Any, last: Any, tools: Any, thinking: bool | None) -> dict[str, Any]:
    def content(said: Any) -> Any:
        if isinstance(said, str):
            return said
        image = {"type": "input_image", "image_url": IMAGE}
        return [image if kind == "image" else {"type": "input_text", "text": text} for kind, text in said]

    items: list[dict[str, Any]] = []
    for i, (asked, (said, thought, calls)) in enumerate(turns):
        items.append({"role": "user", "content": content(asked)})
        if thought:
            items.append({"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": thought}]})
        said_parts = [{"type": "output_text", "text": said, "annotations": []}]
        items.append({"type": "message", "role": "assistant", "content": said_parts})
        items += [
            {"type": "function_call", "call_id": f"{i}.{k}", "name": "f", "arguments": dumped(arguments)}
            for k, (arguments, _) in enumerate(calls)
        ]
        items += [
            {"type": "function_call_output", "call_id": f"{i}.{k}", "output": content(result)}
            for k, (_, result) in enumerate(calls)
        ]
    items.append({"type": "message", "role": "user", "content": content(last)})
    return {
        "model": "tiny",
        "instructions": system,
        "input": items,
        "tools": [
            {"type": "function", "name": name, "description": text, "parameters": parameters, "strict": True}
            for name, text, parameters in tools
        ],
        "reasoning": None if thinking is None else {"effort": "medium" if thinking else "none"},
        "max_output_tokens": 7,
    }


def messages_request(system: str | None, turns: Any, last: Any, tools: Any, thinking: bool | None) -> dict[str, Any]:
    def content(said: Any) -> Any:
        if isinstance(said, str):
            return said
        image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}
        return [image if kind == "image" else {"type": "text", "text": text} for kind, text in said]

    messages: list[dict[str, Any]] = []
    for i, (asked, (said, thought, calls)) in enumerate(turns):
        messages.append({"role": "user", "content": content(asked)})
        blocks = [{"type": "thinking", "thinking": thought, "signature": ""}] if thought else []
        blocks.append({"type": "text", "text": said})
        blocks += [
            {"type": "tool_use", "id": f"{i}.{k}", "name": "f", "input": arguments}
            for k, (arguments, _) in enumerate(calls)
        ]
        messages.append({"role": "assistant", "content": blocks})
        if calls:
            results = [
                {"type": "tool_result", "tool_use_id": f"{i}.{k}", "content": content(result)}
                for k, (_, result) in enumerate(calls)
            ]
            messages.append({"role": "user", "content": results})
    messages.append({"role": "user", "content": content(last)})
    kinds = {None: None, True: {"type": "enabled", "budget_tokens": 1024}, False: {"type": "disabled"}}
    return {
        "model": "tiny",
        "system": system if system is None else [{"type": "text", "text": system}],
        "messages": messages,
        "tools": [
            {"name": name, "input_schema": parameters, **({} if text is None else {"description": text})}
            for name, text, parameters in tools
        ],
        "thinking": kinds[thinking],
        "max_tokens": 7,
    }


def meaning(body: GenerationBody) -> Any:
    """All that a chat request determines, however it is spelled."""
    thinking, (_, max_tokens) = body.thinking, body.asked_max_tokens  # type: ignore[attr-defined]
    # only Anthropic's way of asking for thoughts says how long they may be
    spelled = {"max_tokens", "max_completion_tokens", "reasoning_effort", "enable_thinking", "max_thinking_tokens"}
    return thinking, max_tokens, body.model_dump(exclude_none=True, exclude=spelled)


@settings(max_examples=60)
@given(CONVERSATIONS, TOOLS, st.none() | st.booleans())
def test_all_dialects_mean_the_same(conversation: Any, tools: Any, thinking: bool | None) -> None:
    expected = meaning(CHAT.read(chat_request(*conversation, tools, thinking)).body)
    assert meaning(RESPONSES.read(responses_request(*conversation, tools, thinking)).body) == expected
    assert meaning(MESSAGES.read(messages_request(*conversation, tools, thinking)).body) == expected


def test_text_between_calls_joins_the_turn_and_a_new_message_begins_one() -> None:
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
    said = [{"role": "assistant", "content": text} for text in ("a", "b", "c")]
    asked = {"role": "user", "content": "q"}
    body: Any = RESPONSES.read({"model": "tiny", "input": [said[0], call, said[1], said[2], asked]}).body
    assert [(m.content, len(m.tool_calls or ())) for m in body.messages[:-1]] == [("ab", 1), ("c", 0)]


@pytest.mark.parametrize(
    ("param", "message", "expected"),
    [
        ("messages", "messages: 9 messages are too many", ("input", "input: 9 messages are too many")),
        ("max_completion_tokens", "3 and max_completion_tokens 9", ("max_output_tokens", "3 and max_output_tokens 9")),
        ("messages[1].tool_call_id", "messages[1].tool_call_id: x", ("input[4].call_id", "input[4].call_id: x")),
        ("messages[1].name", "no", ("input[4].name", "no")),
        ("messages[12]", "no", ("input[12]", "no")),
        ("seed", "seed: no", ("seed", "seed: no")),
    ],
)
def test_errors_speak_of_the_clients_fields(param: str, message: str, expected: tuple[str, str]) -> None:
    origins = {
        "messages": "input",
        "messages[1]": "input[4]",
        "messages[1].tool_call_id": "input[4].call_id",
        "max_completion_tokens": "max_output_tokens",
    }
    error = renamed(ContextTooLong(message, param), origins)
    assert (error.param, error.message, type(error), error.code) == (
        *expected,
        ContextTooLong,
        "context_length_exceeded",
    )
    assert renamed(InvalidRequest("all of it"), origins).param is None
