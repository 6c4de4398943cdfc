"""`grpc.health.v1`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ernie_cluster.api.backend import ModelStatus
from ernie_cluster.api.grpc_health import MAX_WATCHES
from ernie_cluster.errors import ReplicaLost
from tests.fakes import FakeBackend, say
from tests.unit.api.grpc_face import TIMEOUT_S, face, failure
from tests.unit.api.test_guard import House

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("lasting_loop"), pytest.mark.timeout(180)]

CODES = grpc.StatusCode


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
