"""The gRPC face over fakes, on a loopback port, and a channel to it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from ernie_cluster.api.grpc_server import GrpcServer
from ernie_cluster.api.guard import Guard
from ernie_cluster.api.limits import ApiLimits
from ernie_cluster.api.service import Service
from ernie_cluster.observe.metrics import InMemoryMetrics
from ernie_cluster.proto.v1 import inference_pb2 as pb
from ernie_cluster.proto.v1.inference_pb2_grpc import InferenceStub
from tests.fakes import FakeBackend, FakeProcessor, say

HELLO = [pb.Message(role=pb.ROLE_USER, text="hi")]
TIMEOUT_S = 30
"""Of every call that is meant to end by itself."""


class Face:
    """A running server and one client's connection to it."""

    def __init__(self, service: Service, server: GrpcServer, channel: grpc.aio.Channel, metrics: InMemoryMetrics):
        self.service = service
        self.server = server
        self.channel = channel
        self.metrics = metrics
        self.stub = InferenceStub(channel)

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    async def chat(self, **fields: Any) -> pb.ChatResponse:
        return await self.stub.Chat(chat_request(**fields), timeout=TIMEOUT_S)

    async def chunks(self, **fields: Any) -> list[pb.ChatChunk]:
        return [chunk async for chunk in self.stub.StreamChat(chat_request(**fields), timeout=TIMEOUT_S)]


def chat_request(**fields: Any) -> pb.ChatRequest:
    return pb.ChatRequest(**{"model": "tiny", "messages": HELLO, **fields})


@asynccontextmanager
async def face(
    backend: FakeBackend | None = None,
    processor: FakeProcessor | None = None,
    limits: ApiLimits | None = None,
    guard: Guard | None = None,
    credentials: Any = None,
) -> AsyncIterator[Face]:
    processor, metrics = processor or FakeProcessor(), InMemoryMetrics()
    service = Service(
        backend or FakeBackend(say("Hello")), {processor.served_name: processor}, limits or ApiLimits(), metrics
    )
    server = GrpcServer(service, guard=guard, host="127.0.0.1", port=0, credentials=credentials, health_interval_s=0.01)
    async with server, grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield Face(service, server, channel, metrics)
    service.workers.close()


async def failure(call: Any, before: list[Any] | None = None) -> grpc.aio.AioRpcError:
    """The error with which a call ends; what a stream brings before it goes into `before`."""
    seen = [] if before is None else before
    try:
        if hasattr(call, "__aiter__"):
            async for message in call:
                seen.append(message)  # they are to be there when it fails
        else:
            await call
    except grpc.aio.AioRpcError as e:
        return e
    raise AssertionError("the call did not fail")


def trailing(error: grpc.aio.AioRpcError) -> dict[str, str]:
    """The metadata that came with it."""
    return {name: str(value) for name, value in error.trailing_metadata()}
