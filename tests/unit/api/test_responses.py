"""The Responses API as the official client sees it, whole and streamed."""

from __future__ import annotations

import json
from typing import Any, cast

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from ernie_cluster.errors import InvalidRequest, Overloaded, ReplicaLost
from tests.fakes import FakeBackend, FakeProcessor, say
from tests.unit.api.client import Server
from tests.unit.api.test_openai_client import connect
from tests.unit.api.test_tools import ANSWER, ARGUMENTS, CALLS

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

URL = "/v1/responses"
PICTURE = "data:image/png;base64,AA=="
TOOLS = cast("Any", [{"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False}])
ASK: dict[str, Any] = {
    "model": "tiny",
    "input": "hi",
    "tools": TOOLS,
    "reasoning": {"effort": "high"},
    "max_output_tokens": 400,
}
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def without_ids(output: Any) -> Any:
    items = [item if isinstance(item, dict) else item.to_dict() for item in output]
    return [{k: v for k, v in item.items() if k not in ("id", "call_id", "parsed_arguments")} for item in items]


async def test_whole() -> None:
    backend = FakeBackend(say("Hello"), num_cached_tokens=3)
    async with connect(Server(backend)) as client:
        answer = await client.responses.create(
            model="tiny", input="hi", instructions="be kind", metadata={"a": "b"}, max_output_tokens=20, store=False
        )
    Response.model_validate(answer.to_dict())
    assert (answer.output_text, answer.status, answer.error) == ("Hello", "completed", None)
    assert (answer.instructions, answer.metadata, answer.max_output_tokens) == ("be kind", {"a": "b"}, 20)
    assert (answer.temperature, answer.top_p, answer.truncation, answer.tool_choice) == (1, 1, "disabled", "auto")
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (len("<system>be kind<user>hi"), 6)
    assert answer.usage.input_tokens_details.cached_tokens == 3
    (request,) = backend.requests
    assert (request.request_id, request.sampling.max_tokens) == (f"{answer.id}-0", 20)


@pytest.mark.parametrize("tokens_per_step", [1, 7, 1000])
async def test_items(tokens_per_step: int) -> None:
    async with connect(Server(FakeBackend(say(ANSWER, tokens_per_step)))) as client:
        answer = await client.responses.create(**ASK)
    Response.model_validate(answer.to_dict())
    thought, message, *calls = cast("Any", answer.output)
    assert (thought.content[0].text, thought.summary) == ("Two cities.", [])
    assert (message.role, message.content[0].text) == ("assistant", "Let me look.")
    assert [(c.name, c.arguments, c.status) for c in calls] == [("weather", a, "completed") for a in ARGUMENTS]
    assert len({c.call_id for c in calls}) == 2
    assert answer.usage is not None
    assert answer.usage.output_tokens_details.reasoning_tokens == len("Two cities.\n</think>")


@pytest.mark.parametrize("tokens_per_step", [1, 7, 1000])
@pytest.mark.parametrize("text", [ANSWER, "", f"hmm</think>{CALLS}and{CALLS}", "no end"])
async def test_a_stream_is_the_whole_answer_in_pieces(text: str, tokens_per_step: int) -> None:
    server = Server(FakeBackend(say(text, tokens_per_step)))
    async with connect(server) as client:
        whole = await client.responses.create(**ASK)
        events = [event async for event in await client.responses.create(**ASK, stream=True)]
    for i, event in enumerate(events):
        EVENT.validate_python(event.to_dict())
        assert event.sequence_number == i
    assert [e.type for e in events[:2]] == ["response.created", "response.in_progress"]
    final = cast("Any", events[-1])
    assert final.type == "response.completed"
    assert without_ids(final.response.output) == without_ids(whole.output)
    assert final.response.usage == whole.usage
    assert assembled(events) == final.response.to_dict()["output"]


def assembled(events: Any) -> list[Any]:
    """The items as events between the first and the last tell them; what is told twice must agree."""
    items: list[Any] = []
    for event in (e.to_dict() for e in events):
        kind, at = event["type"], event.get("output_index")
        if kind == "response.output_item.added":
            assert at == len(items)
            items.append(event["item"])
        elif kind == "response.content_part.added":
            items[at]["content"].append(event["part"])
        elif kind in ("response.output_text.delta", "response.reasoning_text.delta"):
            items[at]["content"][event["content_index"]]["text"] += event["delta"]
        elif kind == "response.function_call_arguments.delta":
            items[at]["arguments"] += event["delta"]
        elif kind in ("response.output_text.done", "response.reasoning_text.done"):
            assert items[at]["content"][event["content_index"]]["text"] == event["text"]
        elif kind == "response.content_part.done":
            assert items[at]["content"][event["content_index"]] == event["part"]
        elif kind == "response.function_call_arguments.done":
            assert items[at]["arguments"] == event["arguments"]
        elif kind == "response.output_item.done":
            items[at]["status"] = event["item"]["status"]
            assert items[at] == event["item"]
    return items


async def test_the_client_s_own_accumulator_understands_the_stream() -> None:
    async with (
        connect(Server(FakeBackend(say(ANSWER, 3)))) as client,
        client.responses.stream(**ASK) as stream,
    ):
        kinds = [event.type async for event in stream]
        response = await stream.get_final_response()
    assert "response.output_text.delta" in kinds
    assert response.output_text == "Let me look."
    calls = [item for item in response.output if item.type == "function_call"]
    assert [call.arguments for call in calls] == ARGUMENTS


async def test_max_output_tokens_leaves_a_response_incomplete() -> None:
    async with connect(Server(FakeBackend(say("Hello")))) as client:
        whole = await client.responses.create(model="tiny", input="hi", max_output_tokens=3)
        events = [
            e async for e in await client.responses.create(model="tiny", input="hi", max_output_tokens=3, stream=True)
        ]
    last = cast("Any", events[-1])
    assert last.type == "response.incomplete"
    for response in (whole, last.response):
        assert (response.status, response.output_text) == ("incomplete", "Hel")
        assert response.incomplete_details.reason == "max_output_tokens"
        assert [item.status for item in response.output] == ["incomplete"]


async def test_an_error_in_mid_stream_fails_the_response() -> None:
    backend = FakeBackend([*say("par", finish_reason=None), ReplicaLost("gone")])
    async with connect(Server(backend)) as client:
        events = [event async for event in await client.responses.create(model="tiny", input="hi", stream=True)]
    error, failed = cast("Any", events[-2:])
    assert (error.type, failed.type, failed.response.status) == ("error", "response.failed", "failed")
    assert failed.response.error.code == "server_error"
    assert failed.response.error.message == error.message
    (item,) = failed.response.output
    assert (item.status, item.content[0].text) == ("incomplete", "par")


async def test_errors_before_the_first_event_have_a_status_of_their_own() -> None:
    async with connect(Server(FakeBackend([Overloaded("full")]))) as client:
        with pytest.raises(openai.RateLimitError):
            await client.responses.create(model="tiny", input="hi", stream=True)
        with pytest.raises(openai.NotFoundError):
            await client.responses.create(model="none", input="hi")


async def test_an_answer_can_be_sent_back() -> None:
    server = Server(FakeBackend(say(ANSWER)), FakeProcessor(max_model_len=4096))
    async with connect(server) as client:
        answer = await client.responses.create(**ASK)
        calls = cast("Any", [item for item in answer.output if item.type == "function_call"])
        results: list[Any] = [
            "18 °C",
            [{"type": "input_text", "text": "see"}, {"type": "input_image", "image_url": PICTURE}],
        ]
        history = [
            {"role": "user", "content": "hi"},
            *(item.to_dict() for item in answer.output),
            *(
                {"type": "function_call_output", "call_id": call.call_id, "output": result}
                for call, result in zip(calls, results, strict=True)
            ),
        ]
        await client.responses.create(model="tiny", input=cast("Any", history), tools=TOOLS)
    user, assistant, first, second = server.processor.calls[1]["messages"]
    assert user == {"role": "user", "content": "hi"}
    assert (assistant["reasoning_content"], assistant["content"]) == ("Two cities.", "Let me look.")
    assert [c["function"]["arguments"] for c in assistant["tool_calls"]] == ARGUMENTS
    assert [m["tool_call_id"] for m in (first, second)] == [c.call_id for c in calls]
    assert first["content"] == "18 °C"
    assert second["content"][1] == {"type": "image_url", "image_url": {"url": PICTURE}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0]"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}]},
            "input[0].content[0].image_url",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png,A"}]}]},
            "input[0].content[0].image_url",
        ),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}, "input[0].call_id"),
        ({"instructions": "x" * 600}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 4096}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": TOOLS * 200}, "tools"),
        ({"reasoning": {"effort": "some"}}, "reasoning.effort"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": "sum"}}}}, "text.format.schema"),
        ({"stream": 1}, "stream"),
    ],
)
async def test_bad_requests_name_the_field(fields: dict[str, Any], param: str) -> None:
    response = await Server(processor=StrictProcessor()).post(URL, {"model": "tiny", "input": "hi"} | fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert "messages" not in error["message"].split(":")[0]


async def test_a_reference_to_a_stored_item_is_told_that_nothing_is_stored() -> None:
    given = [{"role": "user", "content": "hi"}, {"type": "item_reference", "id": "rs_1"}]
    response = await Server().post(URL, {"model": "tiny", "input": given})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "input[1]")
    assert "nothing is stored here" in error["message"]


class StrictProcessor(FakeProcessor):
    """Names the message at fault as the real one does."""

    def chat(self, messages: list[dict[str, Any]], **arguments: Any) -> Any:
        for i, message in enumerate(messages):
            for j, part in enumerate(message["content"] if isinstance(message["content"], list) else ()):
                if part["type"] == "image_url" and ";base64," not in part["image_url"]["url"]:
                    raise InvalidRequest("not a data URL", f"messages[{i}].content[{j}].image_url.url")
        return super().chat(messages, **arguments)


async def test_format_and_tool_choice_mean_the_same_as_in_chat() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    server = Server(FakeBackend(say('{"a": 1}')), FakeProcessor(max_model_len=4096))
    await server.post(
        URL,
        {"model": "tiny", "input": "hi", "text": {"format": {"type": "json_schema", "name": "x", "schema": schema}}},
    )
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    await server.chat(response_format=wanted)
    await server.post(
        URL, {"model": "tiny", "input": "hi", "tools": TOOLS, "tool_choice": {"type": "function", "name": "weather"}}
    )
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    await server.chat(tools=tools, tool_choice={"type": "function", "function": {"name": "weather"}})
    first, second, third, fourth = (r.sampling.grammar for r in server.backend.requests)
    assert first == second != ""
    assert third == fourth != ""


async def test_a_video_of_ours() -> None:
    server = Server()
    part = {"type": "input_video", "video_url": "data:video/mp4;base64,AA==", "fps": 2.0}
    response = await server.post(URL, {"model": "tiny", "input": [{"role": "user", "content": [part]}]})
    assert response.status_code == 200, json.dumps(response.json())
    ((message,),) = (call["messages"] for call in server.processor.calls)
    assert message["content"] == [{"type": "video_url", "video_url": {"url": part["video_url"], "fps": 2.0}}]
