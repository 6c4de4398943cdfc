"""A lean client: a request costs its side little, so that many can be sent from the machine that serves them."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Answer:
    """What came back for a request."""

    status: int
    headers: dict[str, str]
    body: bytes
    first_s: float
    """From sending to the first bytes of the body."""
    total_s: float
    gaps_s: tuple[float, ...] = ()
    """Between the chunks of a stream, the last two aside, which bear no text."""


def request_bytes(body: dict[str, Any], path: str = "/v1/chat/completions", **headers: str) -> bytes:
    """A whole POST as it goes over the wire; underscores in names of headers stand for hyphens."""
    raw = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "host: bench", "content-type: application/json", f"content-length: {len(raw)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + raw


class Client:
    """Keeps its connections; one request at a time on each, as many as are needed."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def send(self, raw: bytes) -> Answer:
        """One request and the whole of its answer. Raises OSError and EOFError where the connection breaks."""
        reader, writer = await self._connection()
        try:
            start = time.perf_counter()
            writer.write(raw)
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:] if line)}
            first_s, body, came_s = 0.0, b"", list[float]()
            if headers.get("transfer-encoding") == "chunked":
                while size := int(await reader.readline(), 16):
                    body += await reader.readexactly(size)
                    first_s = first_s or time.perf_counter() - start
                    came_s.append(time.perf_counter())
                    await reader.readline()
                await reader.readline()
            else:
                body = await reader.readexactly(int(headers.get("content-length", "0")))
            total_s = time.perf_counter() - start
        except BaseException:
            writer.close()
            raise
        self._idle.append((reader, writer))
        gaps_s = tuple(b - a for a, b in pairwise(came_s[:-2]))
        return Answer(int(head[0].split()[1]), headers, body, first_s or total_s, total_s, gaps_s)

    async def get(self, path: str) -> Answer:
        """A page of the same server."""
        return await self.send(f"GET {path} HTTP/1.1\r\nhost: bench\r\n\r\n".encode())

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """One that is open and idle, or a new one."""
        while self._idle:
            reader, writer = self._idle.pop()
            if not (reader.at_eof() or writer.is_closing()):  # the server ends those that were idle for long
                return reader, writer
            writer.close()
        return await asyncio.open_connection(self._host, self._port)

    async def close(self) -> None:
        for _, writer in self._idle:
            writer.close()
