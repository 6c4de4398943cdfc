"""Calls over gRPC: who may make them, what becomes of one that is left, and the server itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from ernie_cluster.api.grpc_server import GrpcServer
from ernie_cluster.api.http_service import create_app
from ernie_cluster.api.limits import ApiLimits
from ernie_cluster.config.api import ApiConfig
from ernie_cluster.errors import ConfigError
from ernie_cluster.observe.metrics import InMemoryMetrics
from ernie_cluster.proto.v1 import inference_pb2 as pb
from ernie_cluster.proto.v1.inference_pb2_grpc import InferenceStub
from ernie_cluster.request import GenerationRequest, TokenEvent
from tests.fakes import FakeBackend, FakeProcessor, say
from tests.unit.api.grpc_face import TIMEOUT_S, chat_request, face, failure, trailing
from tests.unit.api.test_guard import House

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("lasting_loop"), pytest.mark.timeout(180)]

CODES = grpc.StatusCode


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
    assert all(r.timeout_s < 0.6 for r in backend.requests), "gRPC rounds what is left up"


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


# The server


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
