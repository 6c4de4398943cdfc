"""The official Python client and the packaged model: all that programs written for OpenAI's API ask for."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai.types.chat import ChatCompletion
from pydantic import BaseModel

from ernie_cluster.cli.local import is_packaged
from tests.e2e.application import Application, run
from tests.e2e.shown import (
    ASK_COLOUR,
    ASK_MOTION,
    ASK_NUMBER,
    ASK_SUM,
    ASK_WEATHER,
    CITY,
    MODEL,
    NUMBER,
    SUM,
    TOOL,
    WEATHER_THERE,
    circle,
    moving,
    user,
    written,
)

pytestmark = pytest.mark.skipif(not is_packaged(), reason="no pocket checkpoint in this tree")

GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 256}
TOOLS: Any = [TOOL]
OTHER_TOOL: Any = {"type": "function", "function": {"name": "calculator"}}


class Seen(BaseModel):
    """What an answer has to look like."""

    colour: Literal["red", "green", "blue"]
    shape: Literal["circle", "square"]


class City(BaseModel):
    """Arguments of a function."""

    city: Literal["Paris", "Oslo"]


@pytest.fixture(scope="module")
def client(app: Application) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{app.url}/v1", api_key="none", timeout=60, max_retries=0) as client:
        yield client


# ---- chat


def test_what_is_seen(client: openai.OpenAI) -> None:
    asked = {
        "red": user(ASK_COLOUR, image=circle()),
        NUMBER: user(ASK_NUMBER, image=written(NUMBER)),
        "right": user(ASK_MOTION, video=moving()),
    }
    said = {right: client.chat.completions.create(**GREEDY, messages=messages) for right, messages in asked.items()}
    assert [(a.choices[0].message.content or "").rstrip(".") for a in said.values()] == list(said)
    assert all(a.choices[0].finish_reason == "stop" for a in said.values())
    details = [a.to_dict()["usage"]["prompt_tokens_details"] for a in said.values()]  # type: ignore[index]
    assert [(d["image_tokens"] > 0, d["video_tokens"] > 0) for d in details] == [(True, False)] * 2 + [(False, True)]


def test_a_stream_is_accumulated_to_the_whole_answer(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = GREEDY | {"messages": user(ASK_COLOUR, image=circle("blue"))}
    whole = client.chat.completions.create(**asked)
    with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        events = list(stream)
        streamed = stream.get_final_completion()
    assert streamed.choices[0].message.content == whole.choices[0].message.content == "blue"
    assert "".join(e.delta for e in events if e.type == "content.delta") == "blue"
    assert streamed.choices[0].finish_reason == "stop"
    assert streamed.usage is not None
    assert whole.usage is not None
    assert streamed.usage.total_tokens == whole.usage.total_tokens


def test_many_at_once_do_not_see_each_other_s_pictures(app: Application) -> None:
    colours = ["red", "yellow", "green", "blue"] * 2

    async def ask() -> list[ChatCompletion]:
        async with openai.AsyncOpenAI(base_url=f"{app.url}/v1", api_key="none", timeout=60, max_retries=0) as client:
            return await asyncio.gather(
                *(
                    client.chat.completions.create(**GREEDY, messages=user(ASK_COLOUR, image=circle(colour)))
                    for colour in colours
                )
            )

    assert [answer.choices[0].message.content for answer in run(ask())] == colours


@pytest.mark.parametrize("wish", [{"reasoning_effort": "high"}, {"extra_body": {"enable_thinking": True}}])
def test_a_thought_comes_before_the_answer(client: openai.OpenAI, wish: dict[str, Any]) -> None:
    asked: dict[str, Any] = GREEDY | {"messages": user(ASK_SUM, image=written(SUM)), **wish}
    whole = client.chat.completions.create(**asked)
    thought = whole.choices[0].message.to_dict()["reasoning_content"]
    assert "+" in thought  # type: ignore[operator]
    assert whole.choices[0].message.content
    assert whole.usage is not None
    assert whole.usage.completion_tokens_details is not None
    assert 0 < (whole.usage.completion_tokens_details.reasoning_tokens or 0) < whole.usage.completion_tokens

    deltas = [c.choices[0].delta.to_dict() for c in client.chat.completions.create(**asked, stream=True)]
    kinds = [kind for delta in deltas for kind in ("reasoning_content", "content") if delta.get(kind)]
    assert kinds == sorted(kinds, reverse=True), "a thought after the answer has begun"
    assert "".join(str(delta.get("reasoning_content", "")) for delta in deltas) == thought
    assert "".join(str(delta.get("content") or "") for delta in deltas) == whole.choices[0].message.content

    quiet = client.chat.completions.create(**GREEDY, messages=asked["messages"], reasoning_effort="none")
    assert "reasoning_content" not in quiet.choices[0].message.to_dict()


def test_log_probabilities(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = GREEDY | {"messages": user(ASK_COLOUR, image=circle()), "logprobs": True, "top_logprobs": 3}
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.logprobs is not None
    tokens = whole.logprobs.content or []
    assert b"".join(bytes(t.bytes or ()) for t in tokens).decode() == whole.message.content == "red"
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.logprob == max(top.logprob for top in token.top_logprobs), "greedy takes the likeliest"
        assert sum(math.exp(top.logprob) for top in token.top_logprobs) <= 1.001
    with client.chat.completions.stream(**asked) as stream:
        streamed = stream.get_final_completion().choices[0].logprobs
    assert streamed is not None
    assert [t.token for t in streamed.content or ()] == [t.token for t in tokens]


def test_several_answers(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": user("Who are you?"), "max_tokens": 40, "seed": 5, "n": 3}
    asked["temperature"] = 1.2
    whole = client.chat.completions.create(**asked)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    texts = {choice.index: "" for choice in whole.choices}
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == {choice.index: choice.message.content for choice in whole.choices}, "the seed fixes all of them"


def test_max_tokens_and_stop_strings(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "temperature": 0, "messages": user("Hello")}
    cut = client.chat.completions.create(**asked, max_completion_tokens=2)
    assert cut.choices[0].finish_reason == "length"
    assert cut.usage is not None
    assert cut.usage.completion_tokens == 2
    whole = client.chat.completions.create(**asked).choices[0].message.content or ""
    stopped = client.chat.completions.create(**asked, stop=[whole[3:5]]).choices[0]
    assert (stopped.finish_reason, stopped.message.content) == ("stop", whole[: whole.index(whole[3:5])])


# ---- tools


def test_a_call_whole_in_pieces_and_answered(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = GREEDY | {"messages": user(ASK_WEATHER), "tools": TOOLS}
    whole = client.chat.completions.create(**asked).choices[0]
    (call,) = whole.message.tool_calls or ()
    assert whole.finish_reason == "tool_calls"
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": CITY})

    deltas = [
        delta
        for chunk in client.chat.completions.create(**asked, stream=True)
        for delta in chunk.choices[0].delta.tool_calls or ()
    ]
    assert {delta.index for delta in deltas} == {0}
    assert [bool(delta.id) for delta in deltas] == [True] + [False] * (len(deltas) - 1)
    assert "".join((d.function.arguments or "") for d in deltas if d.function) == call.function.arguments
    with client.chat.completions.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion().choices[0]
    assert "tool_calls.function.arguments.delta" in kinds
    assert (final.message.tool_calls or ())[0].function.arguments == call.function.arguments

    history = [*asked["messages"], whole.message, {"role": "tool", "tool_call_id": call.id, "content": WEATHER_THERE}]
    answer = client.chat.completions.create(**GREEDY, messages=history, tools=TOOLS).choices[0]
    assert answer.finish_reason == "stop"
    assert WEATHER_THERE.split()[0] in (answer.message.content or "")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_call_can_be_demanded(client: openai.OpenAI, choice: Any) -> None:
    tools: Any = [openai.pydantic_function_tool(City, name="get_weather")]
    answer = client.chat.completions.parse(**GREEDY, messages=user(ASK_WEATHER), tools=tools, tool_choice=choice)
    (call, *_) = answer.choices[0].message.tool_calls or ()
    assert answer.choices[0].finish_reason == "tool_calls"
    assert isinstance(call.function.parsed_arguments, City)


def test_no_call_where_none_is_wanted(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = GREEDY | {"messages": user(ASK_COLOUR, image=circle()), "tools": [*TOOLS, OTHER_TOOL]}
    answer = client.chat.completions.create(**asked, tool_choice="none").choices[0]
    assert (answer.finish_reason, answer.message.tool_calls, answer.message.content) == ("stop", None, "red")


# ---- forms


def test_answers_are_parsed_into_a_class(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = GREEDY | {"messages": user("What is in this picture?", image=circle())}
    parsed = client.chat.completions.parse(**asked, response_format=Seen).choices[0].message.parsed
    assert isinstance(parsed, Seen)
    with client.chat.completions.stream(**asked, response_format=Seen) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == parsed
    schema = {"type": "json_schema", "json_schema": {"name": "seen", "schema": Seen.model_json_schema()}}
    text = client.chat.completions.create(**asked, response_format=schema).choices[0].message.content  # type: ignore[arg-type]
    assert Seen.model_validate_json(text or "") == parsed


def test_an_answer_that_is_cut_is_told_apart(client: openai.OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(
            model=MODEL, messages=user(ASK_COLOUR, image=circle()), max_tokens=3, response_format=Seen
        )


# ---- errors


@pytest.mark.parametrize(
    ("fields", "kind", "param", "code"),
    [
        ({"model": "gpt-9"}, openai.NotFoundError, "model", "model_not_found"),
        ({"temperature": 9}, openai.BadRequestError, "temperature", None),
        ({"max_tokens": 100_000}, openai.BadRequestError, "max_tokens", "context_length_exceeded"),
        ({"modalities": ["audio"]}, openai.BadRequestError, "modalities", "unsupported_parameter"),
        (
            {"messages": user(ASK_COLOUR, image="data:image/png;base64,AAAA")},
            openai.BadRequestError,
            "messages[0].content[0].image_url.url",
            "invalid_image",
        ),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
def test_errors(
    client: openai.OpenAI, fields: Any, kind: type[openai.APIStatusError], param: str, code: str | None, is_stream: bool
) -> None:
    asked = GREEDY | {"messages": user("Hello")} | fields
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**asked, stream=is_stream)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id


# ---- responses


def seen_input(text: str, image: str) -> Any:
    """One message of the Responses API, in a list."""
    parts = [{"type": "input_image", "image_url": image, "detail": "auto"}, {"type": "input_text", "text": text}]
    return [{"role": "user", "content": parts}]


def test_a_response_whole_and_streamed(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": MODEL, "input": seen_input(ASK_COLOUR, circle()), "temperature": 0, "max_output_tokens": 64,
    }  # fmt: skip
    whole = client.responses.create(**asked)
    assert (whole.output_text, whole.status) == ("red", "completed")
    events = list(client.responses.create(**asked, stream=True))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == "red"
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.usage is not None
    assert whole.usage is not None
    assert last.response.usage.total_tokens == whole.usage.total_tokens


def test_a_response_with_a_thought_and_a_call_goes_on(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", "strict": True, **TOOL["function"]}]
    history = user(ASK_WEATHER)
    asked: dict[str, Any] = {"model": MODEL, "temperature": 0, "tools": tools, "reasoning": {"effort": "high"}}
    first = client.responses.create(**asked, input=history)
    kinds = [item.type for item in first.output]
    assert kinds[0] == "reasoning"
    assert kinds[-1] == "function_call"
    call: Any = first.output[-1]
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": CITY})
    result = {"type": "function_call_output", "call_id": call.call_id, "output": WEATHER_THERE}
    second = client.responses.create(**asked, input=[*history, *first.output, result])
    assert WEATHER_THERE.split()[0] in second.output_text


def test_a_response_is_parsed_into_a_class(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "input": seen_input(ASK_COLOUR, circle()), "temperature": 0}
    parsed = client.responses.parse(**asked, text_format=Seen).output_parsed
    assert isinstance(parsed, Seen)
    with client.responses.stream(**asked, text_format=Seen) as stream:
        assert stream.get_final_response().output_parsed == parsed
