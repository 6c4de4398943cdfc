"""The API over a fake backend, as the synchronous client of a command sees it."""

from __future__ import annotations

import asyncio

import httpx

from ernie_cluster.api.guard import Guard
from ernie_cluster.cli.operate import Cluster
from ernie_cluster.observe.metrics import InMemoryMetrics, Metrics
from tests.fakes import FakeBackend
from tests.unit.api.client import Server
from tests.unit.api.clusters import operated


class Site:
    """A server; `Site().cluster()` asks it."""

    def __init__(
        self, backend: FakeBackend | None = None, guard: Guard | None = None, metrics: Metrics | None = None
    ) -> None:
        self.backend = backend or operated()
        self._server = Server(self.backend, metrics=metrics or InMemoryMetrics(), guard=guard)

    def cluster(self, **headers: str) -> Cluster:
        return Cluster("http://site/v1", headers, transport=httpx.MockTransport(self._answer))

    def _answer(self, request: httpx.Request) -> httpx.Response:
        return asyncio.run(self._pass_on(request))

    async def _pass_on(self, request: httpx.Request) -> httpx.Response:
        async with self._server.client() as client:
            answer = await client.request(
                request.method, request.url, content=request.content, headers=dict(request.headers)
            )
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)
