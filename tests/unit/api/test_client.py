"""The Python client against a real server, as a program without asyncio would use it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from ernie_cluster.actors.environment import free_port
from ernie_cluster.api.guard import Guard
from ernie_cluster.client import Client, image, system, tool_result, user, video
from ernie_cluster.errors import (
    DeadlineExceeded,
    ErnieClusterError,
    InvalidRequest,
    Overloaded,
    RateLimited,
    ReplicaError,
    ReplicaLost,
    Unauthorized,
    UnknownModel,
)
from ernie_cluster.proto.v1 import inference_pb2 as pb
from tests.fakes import FakeBackend, FakeProcessor, bytes_of, say
from tests.unit.api.grpc_face import face
from tests.unit.api.test_guard import House

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("lasting_loop"), pytest.mark.timeout(180)]

T = TypeVar("T")


async def with_client(
    use: Callable[[Client], T],
    backend: FakeBackend | None = None,
    processor: FakeProcessor | None = None,
    guard: Guard | None = None,
    **options: Any,
) -> T:
    """What `use` makes of a client, in a thread beside the server's loop."""

    def connected(target: str) -> T:
        with Client(target, **{"timeout_s": 30, **options}) as client:
            return use(client)

    async with face(backend, processor, guard=guard) as f:
        return await asyncio.to_thread(connected, f.target)


async def test_chat_whole_and_streamed(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"picture")
    processor = FakeProcessor()
    messages = [system("be kind"), user("look", image(tmp_path / "photo.png"), image(b"raw"), video(b"film", fps=2))]

    def use(client: Client) -> tuple[str, str]:
        whole = client.chat("tiny", messages, sampling={"max_tokens": 20}).choices[0].message.text
        chunks = client.stream_chat("tiny", messages)
        return whole, "".join(choice.text for chunk in chunks for choice in chunk.choices)

    assert await with_client(use, processor=processor) == ("Hello", "Hello")
    _, said = processor.calls[0]["messages"]
    text, *media = said["content"]
    assert text["text"] == "look"
    assert [part[part["type"]]["content"] for part in media] == [b"picture", b"raw", b"film"]


async def test_generate_tokenize_models() -> None:
    def use(client: Client) -> tuple[str, str, list[int], list[int], list[str]]:
        return (
            client.generate("tiny", "ab").choices[0].text,
            "".join(choice.text for chunk in client.stream_generate("tiny", [97, 98]) for choice in chunk.choices),
            list(client.tokenize("tiny", "ab").token_ids),
            list(client.tokenize("tiny", [user("ab")]).token_ids),
            [model.name for model in client.models()],
        )

    assert await with_client(use) == ("Hello", "Hello", [97, 98], list(bytes_of("<user>ab")), ["tiny"])


def test_a_tools_result_names_its_call() -> None:
    message = tool_result(pb.ToolCall(id="c1", name="f"), "12 degrees")
    assert (message.role, message.tool_call_id, message.parts[0].text) == (pb.ROLE_TOOL, "c1", "12 degrees")


@pytest.mark.parametrize("url", ["https://a/b.png", "data:image/png;base64,AA==", "FILE:///b.png"])
def test_urls_are_left_to_the_server(url: str) -> None:
    assert image(url).image.url == url
    assert video(url, max_frames=3).video == pb.Video(url=url, max_frames=3)


@pytest.mark.parametrize(
    ("backend_error", "kind"),
    [
        (Overloaded("full", 2.5), Overloaded),
        (RateLimited("used up", 2.5), RateLimited),
        (ReplicaLost("gone"), ReplicaError),
        (KeyError("secret"), ErnieClusterError),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
async def test_errors_come_back_as_they_were_raised(
    backend_error: Exception, kind: type[ErnieClusterError], is_stream: bool
) -> None:
    def use(client: Client) -> Any:
        return list(client.stream_chat("tiny", [user("hi")])) if is_stream else client.chat("tiny", [user("hi")])

    with pytest.raises(ErnieClusterError) as caught:
        await with_client(use, FakeBackend([backend_error]))
    assert type(caught.value) is kind
    assert "secret" not in str(caught.value)
    if isinstance(caught.value, Overloaded):
        assert caught.value.retry_after_s == 3


async def test_errors_of_the_request(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest) as bad:
        await with_client(lambda client: client.chat("tiny", [user("hi")], sampling={"temperature": 3}))
    assert bad.value.param == "sampling.temperature"
    with pytest.raises(UnknownModel, match="served: tiny"):
        await with_client(lambda client: client.chat("none", [user("hi")]))
    with pytest.raises(InvalidRequest, match="larger"):
        await with_client(lambda client: client.chat("tiny", [user(image(bytes(40 * 2**20)))]))
    with pytest.raises(DeadlineExceeded):
        await with_client(
            lambda client: client.chat("tiny", [user("hi")]), FakeBackend([asyncio.Event()]), timeout_s=0.3
        )
    guard = House(tmp_path).server.guard
    with pytest.raises(Unauthorized):
        await with_client(lambda client: client.models(), guard=guard)
    assert await with_client(lambda client: len(client.models()), guard=guard, api_key="alice") == 1


async def test_where_nobody_listens() -> None:
    with Client(f"127.0.0.1:{free_port()}") as client, pytest.raises(ReplicaError):
        await asyncio.to_thread(client.models)


async def test_closing_a_stream_aborts_it() -> None:
    backend = FakeBackend([*say("par", finish_reason=None), asyncio.Event()])

    def use(client: Client) -> str:
        chunks: Any = client.stream_chat("tiny", [user("hi")])
        text = next(chunks).choices[0].text
        chunks.close()
        return str(text)

    text = await with_client(use, backend)  # leaving the server, it waits for its calls
    assert "par".startswith(text)
    assert len(backend.aborted) == 1
