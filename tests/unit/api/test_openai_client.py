"""The official client against the app, as users have it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import httpx
import openai
import pytest

from ernie_cluster.errors import Overloaded, ReplicaLost
from tests.fakes import FakeBackend, say
from tests.unit.api.client import Server

pytestmark = pytest.mark.anyio

MESSAGES = cast("Any", [{"role": "user", "content": "hi"}])


@asynccontextmanager
async def connect(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    http = cast("Any", httpx.AsyncClient(transport=httpx.ASGITransport(server.app)))
    client = openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=http, max_retries=0)
    async with client:
        yield client


async def test_chat() -> None:
    async with connect(Server(FakeBackend(say("Hello")))) as client:
        answer = await client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=20, n=2)
    assert [c.message.content for c in answer.choices] == ["Hello", "Hello"]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


async def test_chat_stream() -> None:
    async with connect(Server(FakeBackend(say("Hello")))) as client:
        stream = await client.chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 6


async def test_pictures_and_extensions() -> None:
    server = Server()
    content = [
        {"type": "text", "text": "what?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA==", "detail": "low"}},
    ]
    extra = {"chat_template_kwargs": {"enable_thinking": False}, "top_k": 5, "include_timeline": True}
    async with connect(server) as client:
        answer = await client.chat.completions.create(
            model="tiny", messages=cast("Any", [{"role": "user", "content": content}]), extra_body=extra
        )
    assert [stage["name"] for stage in cast("Any", answer).timeline] == ["preprocess"]
    (call,) = server.processor.calls
    assert call["enable_thinking"] is False
    assert call["messages"][0]["content"][1] == {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64,AA=="},
    }
    assert server.backend.requests[0].sampling.top_k == 5


async def test_completions() -> None:
    async with connect(Server(FakeBackend(say("Hello")))) as client:
        answer = await client.completions.create(model="tiny", prompt=["a", "b"])
    assert [c.text for c in answer.choices] == ["Hello", "Hello"]


async def test_models() -> None:
    async with connect(Server()) as client:
        assert [m.id async for m in await client.models.list()] == ["tiny"]
        assert (await client.models.retrieve("tiny")).id == "tiny"


async def test_errors_become_the_clients_own_classes() -> None:
    async with connect(Server()) as client:
        with pytest.raises(openai.BadRequestError) as bad:
            await client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=9)
        assert bad.value.param == "temperature"
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(model="none", messages=MESSAGES)
    async with connect(Server(FakeBackend([Overloaded("full")]))) as client:
        with pytest.raises(openai.RateLimitError):
            await client.chat.completions.create(model="tiny", messages=MESSAGES)


async def test_an_error_in_mid_stream_is_raised() -> None:
    backend = FakeBackend([*say("par", finish_reason=None), ReplicaLost("gone")])
    async with connect(Server(backend)) as client:
        stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError, match="a part of the service failed"):
            async for _ in stream:
                pass
