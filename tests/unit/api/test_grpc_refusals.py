"""Calls over gRPC that end with an error: its code, its words and the field that it names."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from ernie_cluster.api.limits import ApiLimits
from ernie_cluster.errors import Overloaded, ReplicaLost
from ernie_cluster.proto.v1 import inference_pb2 as pb
from tests.fakes import FakeBackend, say
from tests.unit.api.grpc_face import HELLO, TIMEOUT_S, Face, chat_request, face, failure, trailing

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("lasting_loop"), pytest.mark.timeout(180)]

CODES = grpc.StatusCode


def raw_chat(f: Face, raw: bytes, **options: Any) -> Any:
    """`Chat` with these bytes as its message."""
    return f.channel.unary_unary("/ernie_cluster.v1.Inference/Chat")(raw, timeout=TIMEOUT_S, **options)


WIDE = pb.Part(image=pb.Image(url="ftp://x"))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"sampling": pb.Sampling(temperature=3)}, "sampling.temperature"),
        ({"sampling": pb.Sampling(temperature=float("nan"))}, "sampling.temperature"),
        ({"sampling": pb.Sampling(max_tokens=0)}, "sampling.max_tokens"),
        ({"sampling": pb.Sampling(max_tokens=600)}, "sampling.max_tokens"),
        ({"sampling": pb.Sampling(stop=["a", ""])}, "sampling.stop[1]"),
        ({"sampling": pb.Sampling(stop=["a"] * 17)}, "sampling.stop"),
        ({"sampling": pb.Sampling(n=9)}, "sampling.n"),
        ({"sampling": pb.Sampling(logprobs=21)}, "sampling.logprobs"),
        ({"sampling": pb.Sampling(stop_token_ids=[999])}, "sampling.stop_token_ids"),
        ({"sampling": pb.Sampling(logit_bias={999: 1})}, "sampling.logit_bias"),
        ({"messages": []}, "messages"),
        ({"messages": [pb.Message(text="hi")]}, "messages[0].role"),
        ({"messages": [pb.Message(role=77, text="hi")]}, "messages[0].role"),
        ({"messages": [pb.Message(role=pb.ROLE_USER)]}, "messages[0].text"),
        ({"messages": [pb.Message(role=pb.ROLE_USER, text="x" * 600)]}, "messages"),
        ({"messages": [*HELLO, pb.Message(role=pb.ROLE_TOOL, text="12")]}, "messages[1].tool_call_id"),
        ({"messages": [pb.Message(role=pb.ROLE_USER, text="a", parts=[WIDE])]}, "messages[0].parts"),
        ({"messages": [pb.Message(role=pb.ROLE_USER, parts=[WIDE])]}, "messages[0].parts[0].image.url"),
        ({"messages": [pb.Message(role=pb.ROLE_USER, parts=[pb.Part()])]}, "messages[0].parts[0]"),
        ({"messages": [pb.Message(role=pb.ROLE_USER, parts=[pb.Part(video={})])]}, "messages[0].parts[0].video"),
        (
            {"messages": [pb.Message(role=pb.ROLE_USER, parts=[pb.Part(image=pb.Image(url="http://a/b"))])]},
            "messages[0].parts[0].image.url",
        ),
        ({"tools": [pb.Tool(name="f", parameters="{")]}, "tools[0].parameters"),
        ({"tools": [pb.Tool(name="f", parameters="[" * 99)]}, "tools[0].parameters"),
        (
            {
                "tools": [pb.Tool(name="f", parameters='{"type": "array"}')],
                "tool_choice": pb.ToolChoice(function="f"),
            },
            "tools[0].parameters",
        ),
        ({"tools": [pb.Tool(name="f"), pb.Tool(builtin="browser")]}, "tools[1].builtin"),
        ({"tools": [pb.Tool(builtin="function")]}, "tools[0].builtin"),
        ({"tools": [pb.Tool(builtin="custom")]}, "tools[0].builtin"),
        ({"tools": [pb.Tool(builtin="calculator", name="f")]}, "tools[0].builtin"),
        ({"tools": [pb.Tool(builtin="calculator"), pb.Tool(name="calculator")]}, "tools[1]"),
        ({"reasoning_effort": 99}, "reasoning_effort"),
        ({"priority": 101}, "priority"),
        ({"max_thinking_tokens": 2**32 - 1, "sampling": pb.Sampling(max_tokens=600)}, "sampling.max_tokens"),
        ({"tool_choice": pb.ToolChoice(mode=pb.ToolChoice.MODE_REQUIRED)}, "tool_choice"),
        ({"tools": [pb.Tool(name="f")], "tool_choice": pb.ToolChoice(function="g")}, "tool_choice.function"),
        ({"response_format": pb.ResponseFormat(json_schema="{")}, "response_format.json_schema"),
        ({"response_format": pb.ResponseFormat(regex="(")}, "response_format.regex"),
        ({"response_format": pb.ResponseFormat(choice={})}, "response_format.choice.texts"),
        ({"cache_salt": ""}, "cache_salt"),
    ],
)
async def test_a_bad_field_is_named(fields: dict[str, Any], param: str) -> None:
    async with face() as f:
        for error in (
            await failure(f.stub.Chat(chat_request(**fields), timeout=TIMEOUT_S)),
            await failure(f.stub.StreamChat(chat_request(**fields), timeout=TIMEOUT_S)),
        ):
            assert error.code() is CODES.INVALID_ARGUMENT
            assert trailing(error)["error-param"] == param
            assert param in str(error.details())
            assert not any(word in str(error.details()) for word in ("image_url", "content", "guided_", "function."))


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (pb.GenerateRequest(model="tiny"), "text"),
        (pb.GenerateRequest(model="tiny", text=""), "text"),
        (pb.GenerateRequest(model="tiny", tokens=pb.TokenIds()), "tokens.ids"),
        (pb.GenerateRequest(model="tiny", tokens=pb.TokenIds(ids=[999])), "tokens.ids"),
        (pb.GenerateRequest(model="tiny", text="a", sampling=pb.Sampling(logprobs=6)), "sampling.logprobs"),
    ],
)
async def test_a_bad_field_of_generate_is_named(request_: pb.GenerateRequest, param: str) -> None:
    async with face() as f:
        error = await failure(f.stub.Generate(request_, timeout=TIMEOUT_S))
        inner = await failure(f.stub.Tokenize(pb.TokenizeRequest(generate=request_), timeout=TIMEOUT_S))
        empty = await failure(f.stub.Tokenize(pb.TokenizeRequest(), timeout=TIMEOUT_S))
    assert (error.code(), trailing(error)["error-param"]) == (CODES.INVALID_ARGUMENT, param)
    assert (inner.code(), trailing(inner)["error-param"]) == (CODES.INVALID_ARGUMENT, f"generate.{param}")
    assert trailing(empty)["error-param"] == "chat"


@pytest.mark.parametrize("raw", [b"\xff", b"\x0a\x05ab", b"\x0a\x01\xff", b"\x12\x02\x0a"])
async def test_what_is_no_message_is_refused(raw: bytes) -> None:
    async with face() as f:
        error = await failure(raw_chat(f, raw))
    assert (error.code(), trailing(error)["error-code"]) == (CODES.INVALID_ARGUMENT, "invalid_message")


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
async def test_too_large_a_message_is_not_taken(compression: grpc.Compression) -> None:
    backend = FakeBackend(say("Hello"))
    async with face(backend, limits=ApiLimits(max_body_bytes=10_000)) as f:
        error = await failure(raw_chat(f, b"\0" * 100_000, compression=compression))
        assert (await f.chat()).choices[0].message.text == "Hello"
    assert error.code() is CODES.RESOURCE_EXHAUSTED
    assert len(backend.requests) == 1


async def test_a_message_with_too_many_parts_is_not_even_parsed() -> None:
    async with face(limits=ApiLimits(max_json_items=1000)) as f:
        error = await failure(raw_chat(f, b"\x12\x00" * 2000))
    assert error.code() is CODES.INVALID_ARGUMENT
    assert "more than 1000" in str(error.details())


async def test_a_call_without_a_message_and_one_whose_message_never_comes() -> None:
    path = "/ernie_cluster.v1.Inference/Chat"
    async with face() as f:
        empty = f.channel.stream_unary(path)(timeout=TIMEOUT_S)
        await empty.done_writing()
        assert (await failure(empty)).code() is CODES.INVALID_ARGUMENT
    async with face(limits=ApiLimits(body_timeout_s=0.05)) as f:
        error = await failure(f.channel.stream_unary(path)(timeout=TIMEOUT_S))
    assert (error.code(), "within 0.05 s" in str(error.details())) == (CODES.DEADLINE_EXCEEDED, True)


async def test_unknown_model_and_method() -> None:
    async with face() as f:
        model = await failure(f.stub.Chat(chat_request(model="none"), timeout=TIMEOUT_S))
        method = await failure(f.channel.unary_unary("/ernie_cluster.v1.Inference/Sing")(b"", timeout=TIMEOUT_S))
    assert (model.code(), trailing(model)["error-param"]) == (CODES.NOT_FOUND, "model")
    assert "served: tiny" in str(model.details())
    assert method.code() is CODES.UNIMPLEMENTED


async def test_overload_says_when_to_come_back() -> None:
    async with face(FakeBackend([Overloaded("full", 2.5)])) as f:
        for call in (f.stub.Chat, f.stub.StreamChat):
            error = await failure(call(chat_request(), timeout=TIMEOUT_S))
            assert (error.code(), trailing(error)["retry-after"]) == (CODES.RESOURCE_EXHAUSTED, "3")


@pytest.mark.parametrize(
    ("broken", "code"), [(KeyError("/home/secret"), CODES.INTERNAL), (ReplicaLost("10.0.0.7 gone"), CODES.UNAVAILABLE)]
)
async def test_what_broke_on_our_side_reveals_nothing(broken: Exception, code: grpc.StatusCode) -> None:
    async with face(FakeBackend([*say("par", finish_reason=None), broken])) as f:
        call = f.stub.StreamChat(chat_request(), timeout=TIMEOUT_S, metadata=[("x-request-id", "req-1")])
        chunks: list[pb.ChatChunk] = []
        error = await failure(call, chunks)
    assert "".join(d.text for c in chunks for d in c.choices) == "par"
    assert f.metrics.value("ernie_requests_in_flight", model="tiny") == 0
    assert error.code() is code
    told = f"{error.details()} {trailing(error)}"
    assert not any(word in told for word in ("secret", "KeyError", "10.0.0.7", "home"))
    assert trailing(error)["x-request-id"] == "req-1"


async def test_details_that_no_header_could_hold_are_cut() -> None:
    async with face() as f:
        error = await failure(f.stub.Chat(chat_request(tools=[pb.Tool(name="f", parameters="é\n")]), timeout=TIMEOUT_S))
        long = await failure(f.stub.Chat(chat_request(model="é" * 5000), timeout=TIMEOUT_S))
    assert error.code() is CODES.INVALID_ARGUMENT
    assert (long.code(), len(str(long.details())) < 2000) == (CODES.NOT_FOUND, True)
