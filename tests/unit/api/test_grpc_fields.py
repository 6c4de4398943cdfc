"""Fields over gRPC beside the everyday ones: what each becomes in the requests that are run, and in the answer."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from ernie_cluster.api.schemas import ChatBody, GenerationBody
from ernie_cluster.proto.v1 import inference_pb2 as pb
from ernie_cluster.request import FinishReason
from tests.fakes import EOS, FakeBackend, FakeProcessor, Step, bytes_of, say
from tests.unit.api.grpc_face import TIMEOUT_S, face
from tests.unit.api.rounds import ADD, BOX, LOOK, Rounds, Seeing, call
from tests.unit.api.test_fields import SeeingProcessor, limit_of

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("lasting_loop"), pytest.mark.timeout(180)]

LOOK_AT_IT = [pb.Part(image=pb.Image(data=b"p")), pb.Part(text="What is on the sign?")]
ASK: dict[str, Any] = {
    "messages": [pb.Message(role=pb.ROLE_USER, parts=LOOK_AT_IT)],
    "tools": [pb.Tool(builtin="image_zoom_in_tool"), pb.Tool(builtin="calculator"), pb.Tool(name="weather")],
}

ELSEWHERE = {
    "max_completion_tokens": "sampling.max_tokens",
    "top_logprobs": "sampling.logprobs",
    "chat_template_kwargs": "enable_thinking",
    "structured_outputs": "response_format",
    "guided_json": "response_format",
    "guided_regex": "response_format",
    "guided_choice": "response_format",
    "stream": "the method",
    "stream_options": "a stream always ends with its usage",
    "user": "read by nobody",
}
"""HTTP's fields that have no namesake in the proto, and where the same is said."""


def test_what_http_can_ask_grpc_can_ask() -> None:
    sampling = set(pb.Sampling.DESCRIPTOR.fields_by_name)
    for body, request in ((ChatBody, pb.ChatRequest), (GenerationBody, pb.GenerateRequest)):
        known = sampling | set(request.DESCRIPTOR.fields_by_name)
        assert set(body.model_fields) - known <= ELSEWHERE.keys()


async def test_priority_and_the_limit_of_thought_arrive() -> None:
    backend = FakeBackend(say("Hello"))
    async with face(backend) as f:
        await f.chat(enable_thinking=True, max_thinking_tokens=7, priority=-5)
        await f.chat(enable_thinking=True, max_thinking_tokens=0)
        await f.stub.Generate(pb.GenerateRequest(model="tiny", text="p", priority=9), timeout=TIMEOUT_S)
    assert [r.priority for r in backend.requests] == [-5, 0, 9]
    assert [r.sampling.thinking for r in backend.requests] == [limit_of(7), limit_of(0), None]


@pytest.mark.parametrize("name", pb.ReasoningEffort.keys())
async def test_reasoning_effort_is_with_or_without(name: str) -> None:
    processor, effort = FakeProcessor(), name.removeprefix("REASONING_EFFORT_")
    async with face(processor=processor) as f:
        await f.chat(reasoning_effort=name)
        await f.chat(reasoning_effort=name, enable_thinking=False)
    expected = {"UNSPECIFIED": None, "NONE": False, "MINIMAL": False}.get(effort, True)
    assert [c["enable_thinking"] for c in processor.calls] == [expected, False]


async def test_usage_tells_of_what_the_tokens_are() -> None:
    async with face(FakeBackend(say("hm</think>ok"), num_cached_tokens=5), SeeingProcessor()) as f:
        whole = await f.chat(enable_thinking=True, sampling=pb.Sampling(n=2))
        chunks = await f.chunks(enable_thinking=True, sampling=pb.Sampling(n=2))
    assert whole.usage == chunks[-1].usage
    assert whole.usage == pb.Usage(
        prompt_tokens=len("<user>hi<think>"),
        completion_tokens=2 * len("hm</think>ok$"),
        cached_tokens=5,
        reasoning_tokens=2 * len("hm</think>"),
        image_tokens=12,
        video_tokens=4,
    )


async def test_token_ids_come_with_their_news_and_the_prompts_once() -> None:
    """The second step is half a character, so it has nothing else to show."""
    steps = (Step((104,)), Step((0xC3,)), Step((0xA9, EOS), FinishReason.STOP))
    asked = pb.GenerateRequest(model="tiny", text="<user>hi", return_token_ids=True)
    async with face(FakeBackend(steps)) as f:
        wholes = [await f.chat(return_token_ids=True), await f.stub.Generate(asked, timeout=TIMEOUT_S)]
        streams = [
            await f.chunks(return_token_ids=True),
            [chunk async for chunk in f.stub.StreamGenerate(asked, timeout=TIMEOUT_S)],
        ]
    prompt, answer = list(bytes_of("<user>hi")), [104, 0xC3, 0xA9, EOS]
    for whole, chunks in zip(wholes, streams, strict=True):
        assert (list(whole.prompt_token_ids), list(whole.choices[0].token_ids)) == (prompt, answer)
        assert [t for c in chunks for d in c.choices for t in d.token_ids] == answer
        assert [list(c.prompt_token_ids) for c in chunks] == [prompt] + [[]] * (len(chunks) - 1)


async def test_nobody_gets_token_ids_unasked() -> None:
    async with face() as f:
        whole, chunks = await f.chat(), await f.chunks()
    assert not whole.prompt_token_ids
    assert not whole.choices[0].token_ids
    assert not any(c.prompt_token_ids or d.token_ids for c in chunks for d in c.choices)


# Tools that the server runs


@pytest.mark.parametrize("is_shown", [False, True])
async def test_built_in_tools_are_run_and_their_calls_shown(is_shown: bool) -> None:
    backend, processor = Rounds(f"I zoom in.{LOOK}", ADD, "It says 7."), Seeing()
    async with face(backend, processor) as f:
        whole = await f.chat(**ASK, include_tool_results=is_shown)
        prompts = [r.num_prompt_tokens for r in backend.requests]
        chunks = await f.chunks(**ASK, include_tool_results=is_shown)
    (choice,) = whole.choices
    assert (choice.message.text, choice.finish_reason) == ("I zoom in.\n\nIt says 7.", pb.FINISH_REASON_STOP)
    assert not choice.message.tool_calls
    looked, added = choice.builtin_tool_calls
    assert (looked.name, json.loads(looked.arguments)) == ("image_zoom_in_tool", {"bbox_2d": BOX, "label": "sign"})
    assert json.loads(looked.details) == {"picture": 1, "bbox_2d": BOX}
    (picture,) = looked.images
    crop = backend.requests[1].media[1]
    assert (picture.width, picture.height, picture.HasField("data")) == (84, 56, is_shown)
    assert picture.data == (base64.b64decode(processor.thumbnail(crop).partition(",")[2]) if is_shown else b"")
    assert (added.name, added.text, added.HasField("error")) == ("calculator", "408", False)
    deltas = [d for c in chunks for d in c.choices]
    streamed = [own for d in deltas for own in d.builtin_tool_calls]
    assert [(own.name, own.details, own.text, own.images) for own in streamed] == [
        (own.name, own.details, own.text, own.images) for own in choice.builtin_tool_calls
    ]
    assert "".join(d.text for d in deltas) == choice.message.text
    assert whole.usage == chunks[-1].usage
    assert whole.usage.prompt_tokens == sum(prompts)


async def test_why_a_built_in_tool_did_not_run_is_told() -> None:
    async with face(Rounds(call("calculator", {"expression": "1/0"}), "I cannot."), Seeing()) as f:
        (choice,) = (await f.chat(**ASK)).choices
    (called,) = choice.builtin_tool_calls
    assert "cannot be evaluated" in called.error
    assert not called.HasField("text")


async def test_an_answer_with_built_in_calls_goes_back_as_it_came() -> None:
    processor = Seeing()
    async with face(Rounds(ADD, "It is 408."), processor) as f:
        (choice,) = (await f.chat(**ASK)).choices
        more = pb.Message(role=pb.ROLE_USER, text="Sure?")
        await f.chat(**ASK | {"messages": [*ASK["messages"], choice.message, more]})
    assert processor.calls[-2]["messages"][1] == {"role": "assistant", "content": "It is 408."}
