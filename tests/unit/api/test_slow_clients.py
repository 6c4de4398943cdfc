"""Clients that read slowly, or not at all, over real sockets with small buffers; and streams that are silent."""

from __future__ import annotations

import asyncio
import json
import socket
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
import uvicorn
from fastapi import FastAPI

from ernie_cluster.api.limits import ApiLimits
from ernie_cluster.api.wire import PIECE_BYTES, HttpWire
from ernie_cluster.errors import SlowClient
from ernie_cluster.proto.v1.inference_pb2_grpc import InferenceStub
from ernie_cluster.request import GenerationRequest, TokenEvent
from tests.fakes import FakeBackend, FakeProcessor, Step, say
from tests.unit.api.client import CHAT_URL, Connection, Server, chat_body
from tests.unit.api.grpc_face import chat_request, face

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

ROOM = 1_000_000
"""Tokens of context."""
BUFFERS = 400_000
"""More bytes than the sockets and the server of these tests take in."""


class Spring(FakeBackend):
    """Spells x's without end, some at a time, as fast as the loop goes round."""

    def __init__(self) -> None:
        super().__init__()
        self.num_tokens = 0
        self.is_dry = asyncio.Event()
        """Its answer was given up."""

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[list[TokenEvent]]:
        try:
            while True:
                yield [TokenEvent(request.request_id, self.num_tokens, (ord("x"),) * 20)]
                self.num_tokens += 20
                await asyncio.sleep(0.001)
        finally:
            self.is_dry.set()


class Wide:
    """A detokenizer to whom every token is many letters: few tokens fill what is between two sockets."""

    def push(self, ids: Sequence[int]) -> str:
        return "x" * 50 * len(ids)

    def flush(self) -> str:
        return ""


class WideProcessor(FakeProcessor):
    def detokenizer(self) -> Any:
        return Wide()


def processor() -> FakeProcessor:
    return WideProcessor(max_model_len=ROOM)


@asynccontextmanager
async def listening(app: Any) -> AsyncIterator[int]:
    """The app under uvicorn, which buffers little of what is not read; its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1))
    serving = asyncio.create_task(server.serve([listener]))
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await serving


def knock(port: int, url: str, body: dict[str, Any]) -> socket.socket:
    """Send a request and read nothing."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    raw = json.dumps(body).encode()
    head = f"POST {url} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
    client.sendall(head.encode() + raw)
    return client


def rest_of(client: socket.socket) -> bytes:
    with client:
        client.settimeout(20)
        return b"".join(iter(lambda: client.recv(1 << 16), b""))


BODIES = {
    CHAT_URL: chat_body(stream=True),
    "/v1/completions": {"model": "tiny", "prompt": "p", "stream": True, "max_tokens": ROOM // 2},
    "/v1/responses": {"model": "tiny", "input": "hi", "stream": True},
    "/v1/messages": {**chat_body(stream=True), "max_tokens": ROOM // 2},
}


@pytest.mark.parametrize("url", BODIES)
async def test_who_reads_nothing_is_parted_with(url: str) -> None:
    backend = Spring()
    limits = ApiLimits(client_idle_timeout_s=0.3, max_unread_tokens=ROOM)
    server = Server(backend, processor(), limits)
    async with listening(server.app) as port:
        client = knock(port, url, BODIES[url])
        await backend.is_dry.wait()
        told = await asyncio.to_thread(rest_of, client)
    assert told.startswith(b"HTTP/1.1 200")
    assert not told.endswith(b"0\r\n\r\n"), "a part was shown as the whole"
    assert server.metrics.value("ernie_request_total", model="tiny", outcome="slow_client") == 1
    assert server.metrics.value("ernie_requests_in_flight", model="tiny") == 0


async def test_what_a_client_has_not_read_is_bounded() -> None:
    """However patient the server is with it."""
    backend, limit = Spring(), 500
    server = Server(backend, processor(), ApiLimits(client_idle_timeout_s=30, max_unread_tokens=limit))
    async with listening(server.app) as port:
        client = knock(port, CHAT_URL, chat_body(stream=True))
        await backend.is_dry.wait()
        assert backend.num_tokens <= BUFFERS // 50 + limit
        client.close()


async def test_a_whole_answer_that_nobody_reads_is_let_go() -> None:
    ended = asyncio.get_running_loop().create_future()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await HttpWire(send, 0.2).write_whole("x" * BUFFERS)
        except Exception as e:
            ended.set_result(e)

    async with listening(app) as port:
        client = knock(port, CHAT_URL, {})
        assert isinstance(await ended, SlowClient)
        told = await asyncio.to_thread(rest_of, client)
    assert told.startswith(b"HTTP/1.1 200")
    assert len(told) < BUFFERS


@pytest.mark.parametrize("length", [0, PIECE_BYTES - 2, PIECE_BYTES - 1, 3 * PIECE_BYTES])
async def test_a_whole_answer_is_the_same_in_pieces(length: int) -> None:
    sent = list[Any]()

    async def send(message: Any) -> None:
        sent.append(message)

    await HttpWire(send, 10).write_whole("x" * length)
    start, *pieces = sent
    body = b"".join(piece["body"] for piece in pieces)
    assert body == b'"' + b"x" * length + b'"'
    assert (b"content-length", b"%d" % len(body)) in start["headers"]
    assert all(len(piece["body"]) <= PIECE_BYTES for piece in pieces)
    assert [piece["more_body"] for piece in pieces] == [True] * (len(pieces) - 1) + [False]


class Deaf(Connection):
    """A client whose server cannot send anything any more."""

    def __init__(self, app: FastAPI, body: bytes) -> None:
        self.is_reached = asyncio.Event()
        super().__init__(app, body)

    async def _send(self, message: Any) -> None:
        self.is_reached.set()
        await asyncio.Event().wait()


async def test_unread_tokens_are_shown() -> None:
    go_on, never = asyncio.Event(), asyncio.Event()
    server = Server(FakeBackend([Step((ord("x"),) * 7), go_on, Step((ord("x"),) * 5), Step((ord("x"),)), never]))
    connection = Deaf(server.app, json.dumps(chat_body(stream=True)).encode())
    await connection.is_reached.wait()
    for shown in (0, 6):
        async with asyncio.timeout(20):
            while server.metrics.value("ernie_unread_tokens", model="tiny") != shown:
                await server.get("/metrics")
        go_on.set()
    connection.task.cancel()
    await asyncio.gather(connection.task, return_exceptions=True)
    await server.get("/metrics")
    assert server.metrics.value("ernie_unread_tokens", model="tiny") == 0


@pytest.mark.usefixtures("lasting_loop")
async def test_grpc_client_that_reads_nothing_is_parted_with() -> None:
    backend = Spring()
    limits = ApiLimits(client_idle_timeout_s=0.3, max_unread_tokens=ROOM)
    async with face(backend, processor(), limits) as f:
        options = [
            ("grpc.http2.bdp_probe", 0),
            ("grpc.use_local_subchannel_pool", 1),
        ]  # 64 KiB of flow control, and no more
        async with grpc.aio.insecure_channel(f.target, options=options) as channel:
            call = InferenceStub(channel).StreamChat(chat_request())  # type: ignore[no-untyped-call]
            await call.read()
            await backend.is_dry.wait()
            call.cancel()
    assert f.metrics.value("ernie_request_total", model="tiny", outcome="slow_client") == 1


@pytest.mark.parametrize("url", BODIES)
async def test_a_silent_stream_shows_that_it_lives(url: str) -> None:
    go_on = asyncio.Event()
    backend = FakeBackend([go_on, *say("Hello")])
    server = Server(backend, limits=ApiLimits(keep_alive_s=0.01))
    body = {k: v for k, v in BODIES[url].items() if k != "max_tokens"} | (
        {"max_tokens": 10} if url == "/v1/messages" else {}
    )
    connection = Connection(server.app, json.dumps(body).encode(), url=url)
    start = await connection.message()
    assert start["status"] == 200
    for _ in range(2):
        assert (await connection.message())["body"] == b": keep-alive\n\n"
    go_on.set()
    await connection.task
    text = b""
    while connection.has_news:
        text += (await connection.message())["body"]
    assert b'"H' in text


async def test_bodies_that_drip_in_are_bounded_all_together() -> None:
    go_on = asyncio.Event()
    server = Server(FakeBackend([go_on, *say("Hello")]), limits=ApiLimits(max_bodies_bytes=1000))
    whole = json.dumps(chat_body(user="x" * 600)).encode()
    answering = Connection(server.app, whole)
    await server.backend.arrivals.get()  # its body counts no more
    dripping = Connection(server.app, whole, is_complete=False)
    await asyncio.sleep(0.01)
    refused = await server.chat(user="x" * 600)
    assert refused.status_code == 429
    assert "limit of all together is 1000" in refused.json()["error"]["message"]
    dripping.disconnect()
    await dripping.task
    go_on.set()
    assert (await server.chat(user="x" * 600)).status_code == 200
    await answering.task


async def test_a_body_that_was_read_is_not_kept_while_the_answer_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mark:
        pass

    class Body(bytes):
        mark: Mark

    go_on, kept = asyncio.Event(), list[weakref.ref[Mark]]()

    async def read_body(*_: Any) -> bytes:
        body = Body(json.dumps(chat_body()).encode())
        body.mark = Mark()  # bytes themselves take no weak references
        kept.append(weakref.ref(body.mark))
        return body

    monkeypatch.setattr("ernie_cluster.api.exchange.read_body", read_body)
    backend = FakeBackend([go_on, *say("Hello")])
    connection = Connection(Server(backend).app, b"")
    await backend.arrivals.get()
    assert kept[0]() is None
    go_on.set()
    await connection.task
