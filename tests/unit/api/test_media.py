from __future__ import annotations

from typing import Any

import pytest

from ernie_cluster.api.media import Wanted, attach, is_inline, wanted_media
from ernie_cluster.api.schemas import ChatBody, CompletionBody, parse_body
from ernie_cluster.errors import Overloaded
from ernie_cluster.request import GenerationRequest
from tests.fakes import FakeProcessor
from tests.unit.api.client import Server, chat_body

DATA = "data:image/png;base64,AA=="


def part(kind: str, url: str) -> dict[str, Any]:
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


def body(*contents: Any) -> ChatBody:
    return parse_body(ChatBody, chat_body(messages=[{"role": "user", "content": content} for content in contents]))


def test_what_is_named_and_not_sent_along_is_wanted() -> None:
    parts = [{"type": "text", "text": "http://a/"}, part("image", "http://a/"), part("image", DATA)]
    assert wanted_media(body("http://a/", parts, [part("video", "FILE:///b")])) == [
        Wanted("messages[1].content[1].image_url.url", "image", "http://a/"),
        Wanted("messages[2].content[0].video_url.url", "video", "FILE:///b"),
    ]
    assert wanted_media(parse_body(CompletionBody, {"model": "m", "prompt": "http://a/"})) == []


def test_what_was_fetched_stands_beside_its_url() -> None:
    chat = body("text", [part("image", "http://a/"), part("video", "http://a/"), part("image", DATA)])
    messages = [message.model_dump(exclude_none=True) for message in chat.messages]
    attached = attach(messages, {("image", "http://a/"): b"picture", ("video", "http://a/"): b"film"})
    assert attached[0]["content"] == "text"
    assert [p[p["type"]].get("content") for p in attached[1]["content"]] == [b"picture", b"film", None]


@pytest.mark.parametrize(("url", "expected"), [(DATA, True), ("DATA:,", True), ("http://data:", False), ("dat", False)])
def test_data_urls_hold_what_they_name(url: str, expected: bool) -> None:
    assert is_inline(url) is expected


class Salts(FakeProcessor):
    """Remembers whose each chat was."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bytes] = []

    def chat(self, messages: list[dict[str, Any]], **given: Any) -> GenerationRequest:
        self.seen.append(given["cache_salt"])
        return super().chat(messages, **given)


@pytest.mark.anyio
async def test_pictures_are_prepared_under_their_owners_salt() -> None:
    """What is kept of a picture for one client must not make another one's answer come sooner."""
    server = Server(processor=(salts := Salts()))
    for fields in ({}, {"cache_salt": "a"}, {"cache_salt": "a"}, {"cache_salt": "b"}):
        assert (await server.chat(**fields)).status_code == 200
    none, a, again, b = salts.seen
    assert none == b""
    assert a == again != b
    assert len(b) == 32


class Untouched(FakeProcessor):
    """No chat comes as far as this."""

    def chat(self, messages: list[dict[str, Any]], **given: Any) -> GenerationRequest:
        raise AssertionError("a chat was prepared")


@pytest.mark.anyio
@pytest.mark.parametrize("url", [DATA, "http://a/"])
async def test_whom_nobody_could_serve_is_refused_before_his_pictures_are_looked_at(url: str) -> None:
    server = Server(processor=Untouched())
    server.backend.closed_door = Overloaded("no place", retry_after_s=7.0)
    messages = [{"role": "user", "content": [part("image", url)]}]
    response = await server.chat(messages=messages, max_tokens=9, priority=3)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "7"
    assert server.backend.knocks == [("tiny", 9, 3)]


@pytest.mark.anyio
async def test_who_has_no_pictures_does_not_knock() -> None:
    server = Server()
    server.backend.closed_door = Overloaded("no place", retry_after_s=7.0)
    assert (await server.chat()).status_code == 200
    assert server.backend.knocks == []
