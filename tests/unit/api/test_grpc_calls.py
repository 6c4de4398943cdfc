"""How calls over gRPC end other than well: who may call, what is refused, and who leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from ernie_cluster.api.backend import ModelStatus
from ernie_cluster.api.grpc_health import MAX_WATCHES
from ernie_cluster.api.grpc_server import GrpcServer
from ernie_cluster.api.http_service import create_app
from ernie_cluster.api.limits import ApiLimits
from ernie_cluster.config.cluster import ApiConfig
from ernie_cluster.errors import ConfigError, Overloaded, ReplicaLost
from ernie_cluster.observe.metrics import InMemoryMetrics
from ernie_cluster.proto.v1 import inference_pb2 as pb
from ernie_cluster.proto.v1.inference_pb2_grpc import InferenceStub
from ernie_cluster.request import GenerationRequest, TokenEvent
from tests.fakes import FakeBackend, FakeProcessor, say
from tests.unit.api.grpc_face import HELLO, TIMEOUT_S, Face, chat_request, face, failure
from tests.unit.api.test_guard import House

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("lasting_loop"), pytest.mark.timeout(30)]

CODES = grpc.StatusCode


def trailing(error: grpc.aio.AioRpcError) -> dict[str, str]:
    return {name: str(value) for name, value in error.trailing_metadata()}


def raw_chat(f: Face, raw: bytes, **options: Any) -> Any:
    """`Chat` with these bytes as its message."""
    return f.channel.unary_unary("/ernie_cluster.v1.Inference/Chat")(raw, timeout=TIMEOUT_S, **options)


# Who may call


@pytest.mark.parametrize(
    "metadata", [[], [("authorization", "Bearer wrong")], [("x-api-key", "wrong")], [("authorization", "Basic alice")]]
)
async def test_without_a_key_that_opens_nothing_is_answered(tmp_path: Path, metadata: list[tuple[str, str]]) -> None:
    backend = FakeBackend(say("Hello"))
    async with face(backend, guard=House(tmp_path).server.guard) as f:
        for call in (
            f.stub.Chat(chat_request(), timeout=TIMEOUT_S, metadata=metadata),
            f.stub.StreamChat(chat_request(), timeout=TIMEOUT_S, metadata=metadata),
            f.stub.ListModels(pb.ListModelsRequest(), timeout=TIMEOUT_S, metadata=metadata),
            reflection_pb2_grpc.ServerReflectionStub(f.channel).ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=TIMEOUT_S, metadata=metadata
            ),
        ):
            error = await failure(call)
            assert error.code() is CODES.UNAUTHENTICATED
            assert trailing(error)["x-request-id"]
    assert backend.requests == []


@pytest.mark.parametrize("metadata", [[("authorization", "Bearer alice")], [("x-api-key", "alice")]])
async def test_with_a_key(tmp_path: Path, metadata: list[tuple[str, str]]) -> None:
    async with face(guard=House(tmp_path).server.guard) as f:
        answer = await f.stub.Chat(chat_request(), timeout=TIMEOUT_S, metadata=metadata)
    assert answer.choices[0].message.text == "Hello"


async def test_a_key_has_the_same_limits_and_cache_as_over_http(tmp_path: Path) -> None:
    house = House(tmp_path, isolate_prefix_cache=True)
    house.admit(alice={"requests": 2}, bob={})
    backend = FakeBackend(say("Hello"))
    async with face(backend, guard=house.server.guard) as f:

        async def ask(key: str) -> dict[str, str]:
            call = f.stub.Chat(chat_request(), timeout=TIMEOUT_S, metadata=[("x-api-key", key)])
            await call
            return dict(await call.trailing_metadata())

        assert (await house.chat("alice")).status_code == 200
        assert (await ask("alice"))["x-ratelimit-remaining-requests"] == "0"
        await ask("bob")
        error = await failure(f.stub.Chat(chat_request(), timeout=TIMEOUT_S, metadata=[("x-api-key", "alice")]))
        # looking around is free
        await f.stub.ListModels(pb.ListModelsRequest(), timeout=TIMEOUT_S, metadata=[("x-api-key", "alice")])
    assert error.code() is CODES.RESOURCE_EXHAUSTED
    assert (trailing(error)["error-code"], trailing(error)["retry-after"]) == ("rate_limit_exceeded", "30")
    assert trailing(error)["x-ratelimit-limit-requests"] == "2"
    alice, bob = (r.cache_salt for r in backend.requests)
    assert alice != bob
    assert alice == house.server.backend.requests[0].cache_salt


async def test_reflection_names_the_services() -> None:
    async with face() as f:
        stub = reflection_pb2_grpc.ServerReflectionStub(f.channel)
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = [a async for a in stub.ServerReflectionInfo(iter([ask]), timeout=TIMEOUT_S)]
    names = {s.name for s in answer.list_services_response.service}
    assert names == {
        "ernie_cluster.v1.Inference",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


# What is refused

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
        assert (await call.read()).choices
        error = await failure(call)
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


# Who leaves


class Watched(FakeBackend):
    """Begins an answer and never ends it; tells who has been let go of."""

    def __init__(self) -> None:
        super().__init__([*say("par", finish_reason=None), asyncio.Event()])
        self._left: asyncio.Queue[str] = asyncio.Queue()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[list[TokenEvent]]:
        try:
            async with aclosing(super().generate(request)) as events:
                async for batch in events:
                    yield batch
        finally:
            self._left.put_nowait(request.request_id)

    async def gone(self) -> None:
        """Until one request has been let go of, and all that came were aborted."""
        async with asyncio.timeout(TIMEOUT_S / 2):
            await self._left.get()
        assert self.finished == []


@pytest.mark.parametrize("method", ["Chat", "StreamChat"])
async def test_a_deadline_aborts_everywhere(method: str) -> None:
    backend = Watched()
    async with face(backend) as f:
        error = await failure(getattr(f.stub, method)(chat_request(sampling=pb.Sampling(n=2)), timeout=0.5))
        assert error.code() is CODES.DEADLINE_EXCEEDED
        await backend.gone()
        await backend.gone()
    assert f.metrics.value("ernie_requests_in_flight", model="tiny") == 0
    assert all(r.timeout_s <= 0.5 for r in backend.requests)


async def test_the_servers_own_deadline() -> None:
    backend = Watched()
    async with face(backend, limits=ApiLimits(request_timeout_s=0.1)) as f:
        error = await failure(f.stub.Chat(chat_request(), timeout=TIMEOUT_S))
        assert f.metrics.value("ernie_request_total", model="tiny", outcome="deadline_exceeded") == 1
        await backend.gone()
    assert error.code() is CODES.DEADLINE_EXCEEDED
    assert "within 0.1 s" in str(error.details())


@pytest.mark.parametrize("method", ["Chat", "StreamChat"])
async def test_a_cancelled_call_aborts_everywhere(method: str) -> None:
    backend = Watched()
    async with face(backend) as f:
        call = getattr(f.stub, method)(chat_request(), timeout=TIMEOUT_S)
        running = asyncio.ensure_future(failure(call))
        await backend.arrivals.get()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await backend.gone()
    assert f.metrics.value("ernie_request_total", model="tiny", outcome="aborted") == 1
    assert f.metrics.value("ernie_requests_in_flight", model="tiny") == 0


async def test_a_lost_connection_aborts_everywhere() -> None:
    backend = Watched()
    async with face(backend) as f:
        async with grpc.aio.insecure_channel(f.target) as channel:
            call = InferenceStub(channel).StreamChat(chat_request(), timeout=TIMEOUT_S)
            assert (await call.read()).choices
        await backend.gone()


async def test_a_stopped_server_ends_watches_and_lets_answers_finish() -> None:
    go = asyncio.Event()
    backend = FakeBackend([*say("Hel", finish_reason=None), go, *say("lo")])
    async with face(backend) as f:
        watch = health_pb2_grpc.HealthStub(f.channel).Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        assert (await watch.read()).status == SERVING
        answer = asyncio.ensure_future(f.chat())
        await backend.arrivals.get()
        stopping = asyncio.ensure_future(f.server.__aexit__(None, None, None))
        assert (await watch.read()).status == NOT_SERVING
        assert await watch.read() is grpc.aio.EOF
        go.set()
        assert (await answer).choices[0].message.text == "Hello"
        await stopping


# Health

SERVING, NOT_SERVING, SERVICE_UNKNOWN = (
    health_pb2.HealthCheckResponse.SERVING,
    health_pb2.HealthCheckResponse.NOT_SERVING,
    health_pb2.HealthCheckResponse.SERVICE_UNKNOWN,
)


@pytest.mark.parametrize(
    ("states", "status"),
    [
        ([ModelStatus("tiny", True, "")], SERVING),
        ([ModelStatus("tiny", True, ""), ModelStatus("big", False, "waiting")], NOT_SERVING),
        ([], NOT_SERVING),
        (ReplicaLost("router gone"), NOT_SERVING),
    ],
)
@pytest.mark.parametrize("service", ["", "ernie_cluster.v1.Inference"])
async def test_check_needs_no_key(tmp_path: Path, states: Any, status: int, service: str) -> None:
    backend = FakeBackend()
    backend.states = states
    async with face(backend, guard=House(tmp_path).server.guard) as f:
        stub = health_pb2_grpc.HealthStub(f.channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_S)
        unknown = await failure(stub.Check(health_pb2.HealthCheckRequest(service="none"), timeout=TIMEOUT_S))
    assert answer.status == status
    assert unknown.code() is CODES.NOT_FOUND


async def test_watch_tells_each_change() -> None:
    backend = FakeBackend()
    async with face(backend) as f:
        stub = health_pb2_grpc.HealthStub(f.channel)
        call = stub.Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        seen = [(await call.read()).status]
        for states in ([], [ModelStatus("tiny", True, "")]):
            backend.states = states
            seen.append((await call.read()).status)
        unknown = stub.Watch(health_pb2.HealthCheckRequest(service="none"), timeout=TIMEOUT_S)
        assert (await unknown.read()).status == SERVICE_UNKNOWN
    assert seen == [SERVING, NOT_SERVING, SERVING]


async def test_watches_are_bounded_and_checks_go_on() -> None:
    async with face() as f:
        stub = health_pb2_grpc.HealthStub(f.channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S) for _ in range(MAX_WATCHES)]
        for watch in watches:
            assert (await watch.read()).status == SERVING
        one_more = stub.Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        assert (await failure(one_more)).code() is CODES.RESOURCE_EXHAUSTED
        assert (await stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)).status == SERVING


# Beside HTTP


async def test_it_lives_as_long_as_the_app() -> None:
    backend, faces = FakeBackend(say("Hello")), []

    def beside(service: Any) -> GrpcServer:
        faces.append(GrpcServer(service, guard=None, host="127.0.0.1", port=0))
        return faces[-1]

    app = create_app(backend, {"tiny": FakeProcessor()}, ApiLimits(), InMemoryMetrics(), beside=beside)
    async with app.router.lifespan_context(app):
        (server,) = faces
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            answer = await InferenceStub(channel).Chat(chat_request(), timeout=TIMEOUT_S)
            assert answer.choices[0].message.text == "Hello"
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        after = await failure(InferenceStub(channel).Chat(chat_request(), timeout=TIMEOUT_S))
    assert after.code() is CODES.UNAVAILABLE
    assert backend.is_closed


async def test_an_address_that_cannot_be_listened_on_is_said() -> None:
    async with face() as f:
        with pytest.raises(ConfigError, match=r"192\.0\.2\.1:7.*grpc_port"):
            await GrpcServer(f.service, guard=None, host="192.0.2.1", port=7).__aenter__()


@pytest.mark.parametrize("port", [0, 65536, 8000])
def test_ports_that_cannot_be(port: int) -> None:
    with pytest.raises(ConfigError, match="grpc_port"):
        ApiConfig(port=8000, grpc_port=port)
