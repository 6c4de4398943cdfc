"""Two ways to call the app without a network: httpx for whole answers, bare ASGI for what happens in between."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from fastapi import FastAPI

from ernie_cluster.api.alias import Alias
from ernie_cluster.api.fetcher import Fetcher
from ernie_cluster.api.guard import Guard
from ernie_cluster.api.http_service import create_app
from ernie_cluster.api.image_search import ImageSearcher
from ernie_cluster.api.limits import ApiLimits
from ernie_cluster.observe.metrics import InMemoryMetrics
from tests.fakes import FakeBackend, FakeProcessor, say

CHAT_URL = "/v1/chat/completions"
COMPLETION_URL = "/v1/completions"


@dataclass
class Server:
    """The app over fakes."""

    backend: FakeBackend = field(default_factory=lambda: FakeBackend(say("Hello")))
    processor: FakeProcessor = field(default_factory=FakeProcessor)
    limits: ApiLimits = field(default_factory=ApiLimits)
    metrics: InMemoryMetrics = field(default_factory=InMemoryMetrics)
    guard: Guard | None = None
    fetcher: Fetcher | None = None
    default_tools: tuple[str, ...] = ()
    searcher: ImageSearcher | None = None
    alias: Alias | None = None
    others: tuple[FakeProcessor, ...] = ()
    """Of further served models."""

    def __post_init__(self) -> None:
        self.app: FastAPI = create_app(
            self.backend,
            {p.served_name: p for p in (self.processor, *self.others)},
            self.limits,
            self.metrics,
            self.guard,
            self.fetcher,
            self.default_tools,
            self.searcher,
            alias=self.alias,
        )

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client

    async def post(self, url: str, body: Any, headers: dict[str, str] | None = None) -> httpx.Response:
        """`body` as JSON, or as it is when it is bytes."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.client() as client:
            return await client.post(
                url, content=content, headers={"content-type": "application/json", **(headers or {})}
            )

    async def get(self, url: str, headers: dict[str, str] | None = None) -> httpx.Response:
        async with self.client() as client:
            return await client.get(url, headers=headers)

    async def chat(self, **fields: Any) -> httpx.Response:
        return await self.post(CHAT_URL, chat_body(**fields))

    async def complete(self, **fields: Any) -> httpx.Response:
        return await self.post(COMPLETION_URL, {"model": "tiny", "prompt": "p", **fields})


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], **fields}


class Connection:
    """One POST over bare ASGI: its answer can be read piece by piece, and the client can leave."""

    def __init__(
        self,
        app: FastAPI,
        body: bytes,
        *,
        is_complete: bool = True,
        headers: Sequence[tuple[bytes, bytes]] = (),
        url: str = CHAT_URL,
    ) -> None:
        self._inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._inbox.put_nowait({"type": "http.request", "body": body, "more_body": not is_complete})
        self._outbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": url,
            "raw_path": url.encode(),
            "root_path": "",
            "scheme": "http",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), *headers],
            "server": ("test", 80),
            "client": ("test", 1),
        }
        self.task = asyncio.ensure_future(app(scope, self._inbox.get, self._send))

    async def _send(self, message: Any) -> None:
        self._outbox.put_nowait(message)

    def feed(self, piece: bytes) -> None:
        """More of the body, and not its end."""
        self._inbox.put_nowait({"type": "http.request", "body": piece, "more_body": True})

    def disconnect(self) -> None:
        self._inbox.put_nowait({"type": "http.disconnect"})

    @property
    def has_news(self) -> bool:
        """A message has come that was not taken."""
        return not self._outbox.empty()

    async def message(self) -> dict[str, Any]:
        """The next ASGI message."""
        return await self._outbox.get()

    async def events(self) -> list[Any]:
        """The server-sent events of the next piece of the body."""
        message = await self.message()
        assert message["type"] == "http.response.body"
        return events_of(message["body"].decode())


def events_of(text: str) -> list[Any]:
    """Parsed `data:` lines; `[DONE]` stays a string."""
    blocks = text.split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [block[6:] if block == "data: [DONE]" else json.loads(block[6:]) for block in blocks]
