"""Fetches the pictures and videos that a request names by URL, within the rules of `inputs/fetch.py`.

A name is resolved once per hop, every address that it has is checked, and the connection goes to one of these very
addresses; TLS and the Host header keep the name. Connections are not reused: one opened under one name must not carry
another's request. Only the bytes go on to the input side.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress

import httpx

from ernie_cluster.api.media import Fetched, Wanted
from ernie_cluster.errors import InvalidRequest
from ernie_cluster.inputs.fetch import (
    FetchRules,
    FileSource,
    WebSource,
    check_address,
    check_redirect,
    check_url,
    read_file,
    too_many_bytes,
)
from ernie_cluster.request import MediaKind

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 10.0
"""Between two pieces."""
MAX_FETCHES = 16
"""At the same time, over all requests; the next one waits."""
MAX_ADDRESSES = 3
"""Of one name that are tried in turn."""

_HEADERS = {"accept": "image/*, video/*", "accept-encoding": "identity", "user-agent": "ernie-cluster"}

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Addresses of a host, best first; raises OSError."""


async def resolve(host: str, port: int) -> Sequence[str]:
    """By the system's resolver."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class Fetcher:
    """Owns the connections, and the bound on how much is fetched at once.

    Args:
        rules: what may be fetched; with the default nothing is.
        resolve: see `Resolve`.
        transport: httpx's; None is the real one.
    """

    def __init__(
        self,
        rules: FetchRules | None = None,
        resolve: Resolve = resolve,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._rules = rules or FetchRules()
        self._resolve = resolve
        self._slots = asyncio.Semaphore(MAX_FETCHES)
        if self._rules.hosts and transport is None:  # it reads the certificates, which takes a while
            transport = httpx.AsyncHTTPTransport(trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))
        self._transport = transport

    async def fetch(self, wanted: Sequence[Wanted]) -> Fetched:
        """Content of all, fetched at the same time; what is named twice is fetched once.

        Raises:
            InvalidRequest: one cannot be had; `param` says which, and the others are given up.
        """
        rules, budget = self._rules, _Budget(self._rules.max_total_bytes)
        once = {(w.kind, w.url): w for w in reversed(wanted)}
        sources: list[WebSource | FileSource] = []
        for w in once.values():
            with _naming(w.param):
                sources.append(check_url(w.url, rules))
                if len(once) > rules.max_urls:
                    raise _failed(f"{len(once)} URLs to fetch, the limit is {rules.max_urls} per request; send fewer")
        tasks = [asyncio.ensure_future(self._content(*job, budget)) for job in zip(once.values(), sources, strict=True)]
        try:
            return dict(zip(once, await asyncio.gather(*tasks), strict=True))
        finally:
            for task in tasks:
                task.cancel()

    async def close(self) -> None:
        """Close what is open."""
        if self._transport is not None:
            await self._transport.aclose()

    async def _content(self, wanted: Wanted, source: WebSource | FileSource, budget: _Budget) -> bytes:
        with _naming(wanted.param):
            if isinstance(source, FileSource):
                content = await asyncio.to_thread(read_file, source, self._rules, wanted.kind)
                budget.take(len(content))
                return content
            async with self._slots:
                try:
                    async with asyncio.timeout(self._rules.timeout_s):
                        return await self._download(source, wanted.kind, budget)
                except (TimeoutError, httpx.TimeoutException):
                    raise _failed(f"{source.host} did not deliver it in time") from None
                except (httpx.HTTPError, OSError, UnicodeError):  # the last: no name that can be looked up
                    raise _failed(f"{source.host} cannot be reached, or broke off") from None

    async def _download(self, source: WebSource, kind: MediaKind, budget: _Budget) -> bytes:
        for _ in range(self._rules.max_redirects + 1):
            async with self._response(source) as response:
                if response.has_redirect_location:
                    source = check_redirect(source, response.headers["location"], self._rules)
                    continue
                if response.status_code != 200:
                    raise _failed(f"{source.host} answered with status {response.status_code}")
                if response.headers.get("content-encoding", "identity").lower() != "identity":
                    raise _failed(f"{source.host} sent it compressed, though asked not to")
                return await self._read(response, kind, budget)
        raise _failed(f"more than {self._rules.max_redirects} redirects; send the URL at their end")

    async def _read(self, response: httpx.Response, kind: MediaKind, budget: _Budget) -> bytes:
        content, limit = bytearray(), self._rules.max_bytes(kind)
        async for piece in response.aiter_raw():
            content += piece
            budget.take(len(piece))
            if len(content) > limit:
                raise too_many_bytes(kind, limit)
        return bytes(content)

    @asynccontextmanager
    async def _response(self, source: WebSource) -> AsyncIterator[httpx.Response]:
        addresses = await self._resolve(source.host, source.port)
        for address in addresses:
            check_address(address, self._rules)
        response = await self._connected(source, addresses[:MAX_ADDRESSES])
        try:
            yield response
        finally:
            await response.aclose()

    async def _connected(self, source: WebSource, addresses: Sequence[str]) -> httpx.Response:
        """The answer's head, from the first address that takes a connection. No client of httpx is between, which
        would keep cookies, follow redirects and unpack bodies."""
        assert self._transport is not None, "a source that no host allowed"
        timeouts = {"connect": CONNECT_TIMEOUT_S, "read": READ_TIMEOUT_S, "write": READ_TIMEOUT_S, "pool": None}
        for address in addresses:
            request = httpx.Request(
                "GET",
                httpx.URL(scheme=source.scheme, host=address, port=source.port, raw_path=source.target.encode()),
                headers={**_HEADERS, "host": source.authority},
                extensions={"sni_hostname": source.host, "timeout": timeouts},
            )
            with suppress(httpx.ConnectError, httpx.ConnectTimeout):
                return await self._transport.handle_async_request(request)
        raise OSError("no address takes a connection")


class _Budget:
    """Bytes that one request may still fetch."""

    def __init__(self, num_bytes: int) -> None:
        self._total = self._left = num_bytes

    def take(self, num_bytes: int) -> None:
        """Raises InvalidRequest when there are not as many."""
        self._left -= num_bytes
        if self._left < 0:
            raise _failed(f"the request's pictures and videos have more than {self._total} bytes; send fewer")


@contextmanager
def _naming(param: str) -> Iterator[None]:
    try:
        yield
    except InvalidRequest as e:
        raise InvalidRequest(e.message, param, e.code) from None


def _failed(what: str) -> InvalidRequest:
    return InvalidRequest(what, code="media_not_fetched")
