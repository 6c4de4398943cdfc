"""What is asked over gRPC and what is answered, through a real server and a real client."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ernie_cluster.proto.v1 import inference_pb2 as pb
from ernie_cluster.request import SamplingParams, Span
from tests.fakes import FakeBackend, FakeProcessor, bytes_of, say
from tests.unit.api.grpc_face import TIMEOUT_S, chat_request, face
from tests.unit.api.test_tools import ANSWER, ARGUMENTS, CALLS

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("lasting_loop"), pytest.mark.timeout(180)]

ASK: dict[str, Any] = {
    "tools": [pb.Tool(name="weather", parameters='{"type": "object"}')],
    "enable_thinking": True,
    "sampling": pb.Sampling(max_tokens=400),
}


async def test_whole() -> None:
    backend = FakeBackend(say("Hello"), num_cached_tokens=3)
    async with face(backend) as f:
        call = f.stub.Chat(
            chat_request(),
            timeout=TIMEOUT_S,
            metadata=[("x-request-id", "mine"), ("traceparent", f"00-{'a' * 32}-{'b' * 16}-01")],
        )
        answer = await call
        assert dict(await call.trailing_metadata())["x-request-id"] == "mine"
        assert dict(await call.trailing_metadata())["traceparent"].startswith(f"00-{'a' * 32}-")
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.text) == (pb.ROLE_ASSISTANT, "Hello")
    assert choice.finish_reason == pb.FINISH_REASON_STOP
    assert answer.usage == pb.Usage(prompt_tokens=len("<user>hi"), completion_tokens=6, cached_tokens=3)
    assert (answer.model, answer.created > 0, len(answer.timeline)) == ("tiny", True, 0)
    assert [r.request_id for r in backend.requests] == [f"{answer.id}-0"]


@pytest.mark.parametrize("tokens_per_step", [1, 7, 1000])
@pytest.mark.parametrize("text", [ANSWER, "", f"hmm</think>{CALLS}and{CALLS}", "no end"])
async def test_a_stream_is_the_whole_answer_in_pieces(text: str, tokens_per_step: int) -> None:
    async with face(FakeBackend(say(text, tokens_per_step))) as f:
        whole = await f.chat(**ASK)
        chunks = await f.chunks(**ASK)
    assert len({(c.id, c.created, c.model) for c in chunks}) == 1
    assert chunks[-1].usage == whole.usage
    assert not any(c.HasField("usage") for c in chunks[:-1])
    assert_same(whole.choices[0], [d for c in chunks for d in c.choices])


def assert_same(whole: pb.ChatChoice, deltas: list[pb.ChatDelta]) -> None:
    """Call ids aside, which are the answer's own."""
    message = whole.message
    assert "".join(d.text for d in deltas) == message.text
    assert "".join(d.reasoning for d in deltas) == message.reasoning
    assert [d.finish_reason for d in deltas] == [0] * (len(deltas) - 1) + [whole.finish_reason]
    calls: list[pb.ToolCall] = []
    for piece in (call for d in deltas for call in d.tool_calls):
        if piece.id:
            assert piece.index == len(calls)
            calls.append(pb.ToolCall(name=piece.name))
        calls[piece.index].arguments += piece.arguments
    assert [(c.name, c.arguments) for c in calls] == [(c.name, c.arguments) for c in message.tool_calls]


async def test_thoughts_and_calls_go_back_as_they_came() -> None:
    processor = FakeProcessor()
    async with face(FakeBackend(say(ANSWER)), processor) as f:
        (choice,) = (await f.chat(**ASK)).choices
        assert choice.finish_reason == pb.FINISH_REASON_TOOL_CALLS
        assert (choice.message.reasoning, choice.message.text) == ("Two cities.", "Let me look.")
        assert [call.arguments for call in choice.message.tool_calls] == ARGUMENTS
        first = choice.message.tool_calls[0]
        result = pb.Message(role=pb.ROLE_TOOL, text="12 degrees", tool_call_id=first.id)
        await f.chat(**ASK | {"messages": [pb.Message(role=pb.ROLE_USER, text="hi"), choice.message, result]})
    _, said, told = processor.calls[-1]["messages"]
    assert said["reasoning_content"] == "Two cities."
    assert said["tool_calls"][0] == {
        "id": first.id,
        "type": "function",
        "function": {"name": "weather", "arguments": ARGUMENTS[0]},
    }
    assert told == {"role": "tool", "content": "12 degrees", "tool_call_id": first.id}
    assert processor.calls[-1]["tools"] == [
        {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    ]
    assert processor.calls[-1]["enable_thinking"] is True


async def test_files_travel_as_bytes() -> None:
    picture, film = bytes(range(256)), b"\0\1film"
    parts = [
        pb.Part(text="look"),
        pb.Part(image=pb.Image(data=picture)),
        pb.Part(video=pb.Video(data=film, fps=2.5, max_frames=8)),
        pb.Part(image=pb.Image(url="data:image/png;base64,AA==")),
    ]
    processor = FakeProcessor()
    async with face(processor=processor) as f:
        answer = await f.chat(messages=[pb.Message(role=pb.ROLE_USER, parts=parts)])
    (message,) = processor.calls[-1]["messages"]
    text, image, video, inline = message["content"]
    assert (text["text"], inline["image_url"]) == ("look", {"url": "data:image/png;base64,AA=="})
    assert image["image_url"]["content"] == picture
    assert video["video_url"]["content"] == film
    assert (video["video_url"]["fps"], video["video_url"]["max_frames"]) == (2.5, 8)
    assert answer.usage.prompt_tokens == len("<user>look###")


async def test_sampling_arrives() -> None:
    sampling = pb.Sampling(
        max_tokens=9, min_tokens=2, temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.5,
        presence_penalty=0.5, frequency_penalty=-0.5, logit_bias={7: 1.5}, seed=3, stop_token_ids=[8], ignore_eos=True,
        logprobs=2,
    )  # fmt: skip
    backend = FakeBackend(say("Hello"))
    async with face(backend) as f:
        await f.chat(sampling=sampling)
        await f.stub.Generate(pb.GenerateRequest(model="tiny", text="p", sampling=sampling), timeout=TIMEOUT_S)
    wanted = SamplingParams(
        max_tokens=9, min_tokens=2, temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.5,
        presence_penalty=0.5, frequency_penalty=-0.5, logit_bias=((7, 1.5),), seed=3, stop_token_ids=(8,),
        ignore_eos=True, num_logprobs=2,
    )  # fmt: skip
    assert [r.sampling for r in backend.requests] == [wanted, wanted]


async def test_zero_is_a_value_and_what_is_not_set_is_the_servers() -> None:
    backend = FakeBackend(say("Hello"))
    async with face(backend) as f:
        await f.chat(sampling=pb.Sampling(temperature=0, seed=0))
        await f.chat()
    greedy, default = (r.sampling for r in backend.requests)
    assert (greedy.temperature, greedy.seed) == (0, 0)
    assert (default.temperature, default.max_tokens) == (SamplingParams().temperature, 512 - len("<user>hi"))


async def test_several_answers_stop_strings_and_log_probabilities() -> None:
    scripts = {0: say("one.two"), 1: say("three.four")}
    sampling = pb.Sampling(n=2, stop=["."], logprobs=1)
    async with face(FakeBackend(scripts=scripts)) as f:
        whole = await f.chat(sampling=sampling)
        chunks = await f.chunks(sampling=sampling)
    assert [(c.index, c.message.text) for c in whole.choices] == [(0, "one"), (1, "three")]
    for choice in whole.choices:
        deltas = [d for c in chunks for d in c.choices if d.index == choice.index]
        assert_same(choice, deltas)
        assert [t for d in deltas for t in d.logprobs] == list(choice.logprobs)
        assert b"".join(t.token for t in choice.logprobs) == choice.message.text.encode()
        assert all((t.logprob, t.top[0].token, t.top[0].logprob) == (-0.5, t.token, -0.5) for t in choice.logprobs)


@pytest.mark.parametrize(
    "wanted",
    [
        pb.ResponseFormat(json_object=True),
        pb.ResponseFormat(json_schema='{"type": "integer"}'),
        pb.ResponseFormat(regex="[0-9]+"),
        pb.ResponseFormat(choice=pb.Choices(texts=["yes", "no"])),
    ],
)
async def test_formats_become_grammars(wanted: pb.ResponseFormat) -> None:
    backend = FakeBackend(say("7"))
    async with face(backend) as f:
        await f.chat(response_format=wanted)
        await f.chat()
    bound, free = (r.sampling.grammar for r in backend.requests)
    assert bound
    assert not free


@pytest.mark.parametrize(
    ("choice", "is_bound"),
    [
        (pb.ToolChoice(mode=pb.ToolChoice.MODE_REQUIRED), True),
        (pb.ToolChoice(function="weather"), True),
        (pb.ToolChoice(mode=pb.ToolChoice.MODE_AUTO), False),
        (pb.ToolChoice(mode=pb.ToolChoice.MODE_NONE), False),
    ],
)
async def test_tool_choice(choice: pb.ToolChoice, is_bound: bool) -> None:
    backend, processor = FakeBackend(say("7")), FakeProcessor()
    async with face(backend, processor) as f:
        await f.chat(**ASK | {"tool_choice": choice})
    assert bool(backend.requests[0].sampling.grammar) == is_bound
    assert (processor.calls[0]["tools"] is None) == (choice.mode == pb.ToolChoice.MODE_NONE)


async def test_timeline() -> None:
    backend = FakeBackend(
        say("Hi"), spans=(Span("decode", 1.5, 0.5, (("why", "near"), ("why", "idle"), ("tokens", 3))),)
    )
    async with face(backend) as f:
        whole = await f.chat(include_timeline=True, sampling=pb.Sampling(n=2))
        chunks = await f.chunks(include_timeline=True)
    assert [(s.name, s.choice) for s in whole.timeline] == [("decode", 0), ("decode", 1), ("preprocess", 0)]
    assert [s.name for s in chunks[-1].timeline] == ["decode", "preprocess"]
    stage = whole.timeline[0]
    assert (stage.start_s, stage.duration_s) == (1.5, 0.5)
    assert [(d.key, d.value) for d in stage.details] == [("why", "near"), ("why", "idle"), ("tokens", "3")]


@pytest.mark.parametrize("prompt", [{"text": "ab"}, {"tokens": pb.TokenIds(ids=[97, 98])}])
async def test_generate(prompt: dict[str, Any]) -> None:
    backend = FakeBackend(say("Hello", 2))
    request = pb.GenerateRequest(model="tiny", **prompt)
    async with face(backend) as f:
        whole = await f.stub.Generate(request, timeout=TIMEOUT_S)
        chunks = [chunk async for chunk in f.stub.StreamGenerate(request, timeout=TIMEOUT_S)]
    assert [r.prompt_token_ids.tolist() for r in backend.requests] == [[97, 98]] * 2
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == ("Hello", pb.FINISH_REASON_STOP)
    assert "".join(d.text for c in chunks for d in c.choices) == "Hello"
    assert whole.usage == chunks[-1].usage == pb.Usage(prompt_tokens=2, completion_tokens=6)


async def test_a_stream_comes_as_it_is_made() -> None:
    go = asyncio.Event()
    async with face(FakeBackend([*say("Hel", finish_reason=None), go, *say("lo")])) as f:
        call = f.stub.StreamChat(chat_request(), timeout=TIMEOUT_S)
        text = ""
        async for chunk in call:
            text += "".join(d.text for d in chunk.choices)
            if text == "Hel":
                go.set()
    assert text == "Hello"


async def test_tokenize() -> None:
    chat = chat_request(messages=[pb.Message(role=pb.ROLE_USER, parts=[pb.Part(image=pb.Image(data=b"p"))])])
    async with face() as f:
        text = await f.stub.Tokenize(
            pb.TokenizeRequest(generate=pb.GenerateRequest(model="tiny", text="aé")), timeout=TIMEOUT_S
        )
        prompt = await f.stub.Tokenize(pb.TokenizeRequest(chat=chat), timeout=TIMEOUT_S)
    assert tuple(text.token_ids) == bytes_of("aé")
    assert b"".join(text.tokens).decode() == "aé"
    assert text.max_model_len == f.service.processor("tiny").max_model_len
    assert b"".join(prompt.tokens) == b"<user>#"


async def test_list_models() -> None:
    async with face() as f:
        (model,) = (await f.stub.ListModels(pb.ListModelsRequest(), timeout=TIMEOUT_S)).models
    assert (model.name, model.max_model_len) == ("tiny", 512)
    assert model.created == f.service.created
