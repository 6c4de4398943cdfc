"""The API over a fake backend, on ports of this machine, in a thread of its own: for clients that bring their own loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import uvicorn

from ernie_cluster.api.grpc_server import GrpcServer
from ernie_cluster.api.http_service import create_app
from ernie_cluster.api.limits import ApiLimits
from ernie_cluster.api.service import Service
from ernie_cluster.observe.metrics import InMemoryMetrics, PrometheusMetrics
from ernie_cluster.request import FinishReason, GenerationRequest, TokenEvent
from tests.fakes import FakeBackend, FakeProcessor, say

_WAIT_S = 30.0


class Talker(FakeBackend):
    """Answers every request to its `max_tokens`, a token at a time, so that each is a piece of a stream."""

    def __init__(self, token_s: float = 0.001) -> None:
        super().__init__(say("x" * 4096, finish_reason=FinishReason.LENGTH))
        self.token_s = token_s

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[list[TokenEvent]]:
        async with contextlib.aclosing(super().generate(request)) as events:
            async for event in events:
                yield event
                await asyncio.sleep(self.token_s)


@dataclass
class Site:
    """A running server of the model `tiny`, whose tokens are bytes."""

    backend: FakeBackend = field(default_factory=Talker)
    max_model_len: int = 2**20
    url: str = ""
    grpc_target: str = ""
    _is_up: threading.Event = field(default_factory=threading.Event)
    _stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def _serve(self) -> None:
        processors = {"tiny": FakeProcessor(max_model_len=self.max_model_len)}
        app = create_app(self.backend, processors, ApiLimits(), PrometheusMetrics())
        service = Service(self.backend, processors, ApiLimits(), InMemoryMetrics())
        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", access_log=False, lifespan="off")
        server = uvicorn.Server(config)
        config.load()
        server.lifespan = config.lifespan_class(config)
        await server.startup()
        port = server.servers[0].sockets[0].getsockname()[1]
        async with GrpcServer(service, guard=None, host="127.0.0.1", port=0) as face:
            self.url, self.grpc_target = f"http://127.0.0.1:{port}", f"127.0.0.1:{face.port}"
            self._loop = asyncio.get_running_loop()
            self._is_up.set()
            ticks = asyncio.create_task(server.main_loop())
            await self._stop.wait()
            server.should_exit = True
            await ticks
            await server.shutdown()
        service.workers.close()

    @contextmanager
    def running(self) -> Iterator[Site]:
        thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="site", daemon=True)
        thread.start()
        assert self._is_up.wait(_WAIT_S), "the server did not start"
        try:
            yield self
        finally:
            self._loop.call_soon_threadsafe(self._stop.set)
            thread.join(_WAIT_S)
            assert not thread.is_alive(), "the server did not end"
