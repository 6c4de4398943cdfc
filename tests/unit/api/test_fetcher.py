from __future__ import annotations

import asyncio
import gzip
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from ernie_cluster.api.fetcher import MAX_FETCHES, Fetcher
from ernie_cluster.api.media import Wanted
from ernie_cluster.errors import InvalidRequest
from ernie_cluster.inputs.fetch import FetchRules
from tests.unit.api.client import Server

pytestmark = pytest.mark.anyio

Answer = Callable[[str, asyncio.StreamWriter], Awaitable[None]]
"""What a web server does with one request's head."""


def whole(body: bytes, *headers: str, status: str = "200 OK") -> Answer:
    async def answer(head: str, out: asyncio.StreamWriter) -> None:
        lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", *headers]
        out.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        await out.drain()

    return answer


def redirect(location: str) -> Answer:
    return whole(b"", f"location: {location}", status="302 Found")


async def endless(head: str, out: asyncio.StreamWriter) -> None:
    """Says that it is short, by an encoding that needs no length."""
    out.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    while not out.is_closing():
        out.write(b"10000\r\n" + bytes(65536) + b"\r\n")
        await out.drain()


async def silent(head: str, out: asyncio.StreamWriter) -> None:
    out.write(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc")
    await out.drain()
    await asyncio.Event().wait()


async def broken_off(head: str, out: asyncio.StreamWriter) -> None:
    out.write(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc")
    await out.drain()


async def babble(head: str, out: asyncio.StreamWriter) -> None:
    out.write(b"220 smtp.example ESMTP\r\n")
    await out.drain()


class Web:
    """A web server on loopback, and the resolver that leads every name to it."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.heads: list[str] = []
        self.addresses: list[Sequence[str]] = []
        """What the resolver says in turn; loopback when it is empty."""
        self.lookups: list[str] = []
        self.port = 0

    async def handle(self, reader: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.heads.append(head)
            await self.answers[head.split()[1]](head, out)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            out.close()

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        self.lookups.append(host)
        return self.addresses.pop(0) if self.addresses else ["127.0.0.1"]

    def url(self, path: str, host: str = "images.test") -> str:
        return f"http://{host}:{self.port}{path}"


@asynccontextmanager
async def web(**answers: Answer) -> AsyncIterator[Web]:
    served = Web()
    served.answers = {f"/{name}": answer for name, answer in answers.items()}
    tasks: set[asyncio.Task[None]] = set()

    def connected(reader: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.ensure_future(served.handle(reader, out)))

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    served.port = server.sockets[0].getsockname()[1]
    try:
        yield served
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def fetching(served: Web, **rules: Any) -> AsyncIterator[Fetcher]:
    allowed = FetchRules(**{"hosts": (f"*:{served.port}",), "allow_private": True, "timeout_s": 20.0, **rules})
    fetcher = Fetcher(allowed, served.resolve)
    try:
        yield fetcher
    finally:
        await fetcher.close()


def picture(url: str, param: str = "p") -> Wanted:
    return Wanted(param, "image", url)


async def refusal(fetcher: Fetcher, url: str) -> str:
    with pytest.raises(InvalidRequest) as caught:
        await fetcher.fetch([picture(url)])
    assert caught.value.param == "p"
    assert "127.0.0.1" not in caught.value.message
    return caught.value.message


async def test_a_file_is_fetched_from_the_checked_address_under_its_name() -> None:
    async with web(a=whole(b"content")) as served, fetching(served) as fetcher:
        url = served.url("/a")
        assert await fetcher.fetch([picture(url)]) == {("image", url): b"content"}
        assert served.lookups == ["images.test"]
        assert f"host: images.test:{served.port}" in served.heads[0].lower()
        assert "accept-encoding: identity" in served.heads[0].lower()


async def test_all_of_a_request_come_together_and_twice_the_same_comes_once() -> None:
    async with web(a=whole(b"a"), b=whole(b"b")) as served, fetching(served) as fetcher:
        a, b = served.url("/a"), served.url("/b")
        found = await fetcher.fetch([picture(a), Wanted("q", "video", b), picture(a, "r")])
        assert found == {("image", a): b"a", ("video", b): b"b"}
        assert len(served.heads) == 2


async def test_a_name_with_any_forbidden_address_is_not_connected_to() -> None:
    async with web(a=whole(b"content")) as served:
        for addresses in (["127.0.0.1"], ["93.184.216.34", "10.0.0.1"], ["::ffff:7f00:1"]):
            served.addresses = [addresses]
            async with fetching(served, allow_private=False) as fetcher:
                assert "has no public address" in await refusal(fetcher, served.url("/a"))
        assert served.heads == []


async def test_a_name_is_asked_for_once_so_it_cannot_change_its_mind() -> None:
    """Rebinding: a second look-up would lead inside."""
    async with web(a=whole(b"content")) as served, fetching(served) as fetcher:
        served.addresses = [["127.0.0.1"], ["169.254.169.254"]]
        await fetcher.fetch([picture(served.url("/a"))])
        assert len(served.lookups) == 1


async def test_every_hop_is_checked_again() -> None:
    async with web(
        a=redirect("http://169.254.169.254/latest"), b=redirect("/c"), c=whole(b"c"), d=redirect("/d")
    ) as served:
        async with fetching(served) as fetcher:
            assert "nothing is fetched from 169.254.169.254" in await refusal(fetcher, served.url("/a"))
            assert await fetcher.fetch([picture(served.url("/b"))]) == {("image", served.url("/b")): b"c"}
            assert "more than 3 redirects" in await refusal(fetcher, served.url("/d"))
            assert len([head for head in served.heads if head.startswith("GET /d ")]) == 4
            served.addresses = [["127.0.0.1"], ["169.254.169.254"]]  # the same name, on the second hop
            assert "has no public address" in await refusal(fetcher, served.url("/b"))
        async with fetching(served, hosts=("*", f"*:{served.port}")) as fetcher:
            served.addresses = [["127.0.0.1"], ["169.254.169.254"]]
            assert "has no public address" in await refusal(fetcher, served.url("/a"))


async def test_the_next_address_is_tried_when_one_takes_no_connection() -> None:
    async with web(a=whole(b"content")) as served, fetching(served) as fetcher:
        served.addresses = [["127.0.0.2", "127.0.0.1"]]  # the server listens on the second only
        assert list((await fetcher.fetch([picture(served.url("/a"))])).values()) == [b"content"]
        served.addresses = [["127.0.0.2"]]
        assert "cannot be reached" in await refusal(fetcher, served.url("/a"))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (whole(b"", status="404 Not Found"), "answered with status 404"),
        (whole(b"", status="500 No"), "answered with status 500"),
        (whole(bytes(1001)), "more than 1000 bytes"),
        (endless, "more than 1000 bytes"),
        (whole(gzip.compress(bytes(10**6))[:900], "content-encoding: gzip"), "sent it compressed"),
        (whole(b"", "x: " + "a" * 300_000), "cannot be reached, or broke off"),
        (broken_off, "cannot be reached, or broke off"),
        (babble, "cannot be reached, or broke off"),
    ],
)
async def test_servers_that_do_not_deliver(answer: Answer, words: str) -> None:
    async with web(a=answer) as served, fetching(served, max_image_bytes=1000) as fetcher:
        assert words in await refusal(fetcher, served.url("/a"))


async def test_a_server_that_falls_silent_is_left() -> None:
    async with web(a=silent) as served, fetching(served, timeout_s=0.3) as fetcher:
        assert "did not deliver it in time" in await refusal(fetcher, served.url("/a"))


async def test_one_that_cannot_be_had_ends_the_others() -> None:
    async with web(a=silent, b=whole(b"", status="404 Not Found")) as served, fetching(served) as fetcher:
        with pytest.raises(InvalidRequest) as caught:
            await fetcher.fetch([picture(served.url("/a")), picture(served.url("/b"), "second")])
        assert caught.value.param == "second"


async def test_a_request_has_a_budget_of_bytes_and_urls() -> None:
    async with web(a=whole(bytes(600)), b=whole(bytes(600))) as served:
        wanted = [picture(served.url("/a")), picture(served.url("/b"))]
        async with fetching(served, max_total_bytes=1200) as fetcher:
            assert len(await fetcher.fetch(wanted)) == 2
        for rules, words in (({"max_total_bytes": 1199}, "more than 1199 bytes"), ({"max_urls": 1}, "2 URLs to fetch, the limit is 1")):  # fmt: skip
            async with fetching(served, **rules) as fetcher:
                with pytest.raises(InvalidRequest, match=words):
                    await fetcher.fetch(wanted)


async def test_no_more_than_so_many_at_the_same_time() -> None:
    busy, most = 0, 0
    all_in, arrived = asyncio.Event(), asyncio.Event()

    async def hold(head: str, out: asyncio.StreamWriter) -> None:
        nonlocal busy, most
        busy += 1
        most = max(most, busy)
        if busy == MAX_FETCHES:
            arrived.set()
        await all_in.wait()
        busy -= 1
        await whole(b"x")(head, out)

    names = [f"p{i}" for i in range(MAX_FETCHES + 3)]
    async with web(**dict.fromkeys(names, hold)) as served, fetching(served) as fetcher:
        task = asyncio.ensure_future(fetcher.fetch([picture(served.url(f"/{name}")) for name in names]))
        await arrived.wait()
        all_in.set()
        assert len(await task) == len(names)
        assert most == MAX_FETCHES


async def test_tls_is_held_to_the_name_and_the_connection_to_the_address() -> None:
    asked: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200, stream=httpx.ByteStream(b"content"), headers={"set-cookie": "a=b"})

    async def resolve(host: str, port: int) -> Sequence[str]:
        return ["2606:4700::1111"]

    fetcher = Fetcher(FetchRules(hosts=("images.test",)), resolve, httpx.MockTransport(handle))
    for _ in range(2):
        await fetcher.fetch([picture("https://images.test/a?b=%20c")])
    request = asked[-1]
    assert (request.url.host, request.url.raw_path) == ("2606:4700::1111", b"/a?b=%20c")
    assert (request.headers["host"], request.extensions["sni_hostname"]) == ("images.test", "images.test")
    assert "cookie" not in request.headers


async def test_a_name_without_certificate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object, **__: object) -> httpx.Response:
        raise httpx.ConnectError("certificate verify failed") from ssl.SSLError()

    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", fail)
    async with web() as served, fetching(served) as fetcher:
        assert await refusal(fetcher, served.url("/a")) == "images.test cannot be reached, or broke off"


async def test_files_are_read_below_the_folder(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"content")
    fetcher = Fetcher(FetchRules(folder=str(tmp_path), max_total_bytes=7))
    url = f"file://{tmp_path}/a.png"
    assert await fetcher.fetch([picture(url)]) == {("image", url): b"content"}
    assert "more than 6 bytes" in await refusal(Fetcher(replace(fetcher._rules, max_total_bytes=6)), url)


def part(kind: str, url: str) -> dict[str, Any]:
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


async def test_a_chat_gets_what_it_names() -> None:
    async with web(a=whole(b"a"), b=whole(b"b")) as served, fetching(served) as fetcher:
        server = Server(fetcher=fetcher)
        inline = "data:image/png;base64,AA=="
        content = [part("image", served.url("/a")), part("video", served.url("/b")), part("image", inline)]
        response = await server.chat(messages=[{"role": "user", "content": content}])
        assert response.status_code == 200
        (message,) = server.processor.calls[0]["messages"]
        assert [p[p["type"]].get("content") for p in message["content"]] == [b"a", b"b", None]


async def test_a_source_of_anthropics_is_fetched_alike() -> None:
    async with web(a=whole(b"a")) as served, fetching(served) as fetcher:
        server = Server(fetcher=fetcher)
        for url, status in ((served.url("/a"), 200), ("http://evil.org/a", 400)):
            content = [{"type": "image", "source": {"type": "url", "url": url}}]
            body = {"model": "tiny", "max_tokens": 5, "messages": [{"role": "user", "content": content}]}
            response = await server.post("/v1/messages", body)
            assert response.status_code == status
        (message,) = server.processor.calls[0]["messages"]
        assert message["content"][0]["image_url"]["content"] == b"a"
        assert "messages[0].content[0].source.url" in response.json()["error"]["message"]


async def test_a_chat_that_names_what_cannot_be_had_is_told_which() -> None:
    async with web(a=whole(b"a")) as served, fetching(served) as fetcher:
        content = [part("image", served.url("/a")), part("video", "http://evil.org/")]
        response = await Server(fetcher=fetcher).chat(messages=[{"role": "user", "content": content}])
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["param"], error["code"]) == ("messages[0].content[1].video_url.url", "media_not_fetched")
        assert served.heads == []


async def test_by_default_nothing_is_fetched() -> None:
    server = Server()
    for url in ("http://images.test/a", "FILE:///etc/passwd"):
        response = await server.chat(messages=[{"role": "user", "content": [part("image", url)]}])
        assert response.status_code == 400
        assert "this server fetches nothing" in response.json()["error"]["message"]
    assert server.processor.calls == []
