"""An open-loop client of completions on bare asyncio: what each request's client sees, and the client's own lag."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass

from ernie_cluster.policy.replay.machine import Job

TOKEN_IDS = range(300, 1900)
"""Of a tiny checkpoint, without special ones."""
STREAMED: dict[str, object] = {
    "temperature": 0,
    "ignore_eos": True,
    "stream": True,
    "stream_options": {"include_usage": True},
}


@dataclass(slots=True)
class Seen:
    """One request, in seconds since the run began."""

    model: str
    due_s: float
    """When it was to be sent; all else counts from here, so that a client that lags hides nothing."""
    sent_s: float
    prompt_tokens: int
    output_tokens: int
    """That were asked for."""
    status: int = 0
    """Of HTTP; 0 = no answer."""
    first_s: float = math.inf
    last_s: float = math.inf
    tokens: int = 0
    """That came."""
    cached: int = 0
    """Prompt tokens that were found in a cache."""
    error: str = ""

    @property
    def is_whole(self) -> bool:
        """All tokens came."""
        return self.tokens == self.output_tokens and not self.error

    @property
    def is_refused(self) -> bool:
        """Told to come back later, before anything was done."""
        return self.status in (429, 503)

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.due_s

    @property
    def tpot_s(self) -> float:
        return (self.last_s - self.first_s) / (self.tokens - 1) if self.tokens > 1 else 0.0

    def keeps(self, ttft_s: float, tpot_s: float) -> bool:
        """Whole, and within both targets."""
        return self.is_whole and self.ttft_s <= ttft_s and self.tpot_s <= tpot_s


def _nothing(seen: Seen) -> None:
    """Nobody wants to know."""


def body_of(job: Job) -> dict[str, object]:
    """A prompt that no cache knows, and an answer of exactly the wanted length."""
    return completion(job, random.Random(job.number).choices(TOKEN_IDS, k=job.prompt_tokens))


def completion(job: Job, token_ids: Sequence[int]) -> dict[str, object]:
    """The same with this prompt."""
    return {"model": job.model, "prompt": token_ids, "max_tokens": job.output_tokens} | STREAMED


async def play(
    jobs: Sequence[Job],
    port: int,
    timeout_s: float,
    on_end: Callable[[Seen], None] = _nothing,
    *,
    path: str = "/v1/completions",
    body: Callable[[Job], Mapping[str, object]] = body_of,
) -> list[Seen]:
    """Send each request when it is due, whatever became of those before; ends with the last answer.

    Args:
        jobs: by time of arrival.
        port: of the server on this machine.
        timeout_s: an answer that takes longer has failed.
        on_end: called with each request that has ended.
        path, body: what is sent of a job, and where to.
    """
    start_s = time.perf_counter()
    tasks = []
    for job in jobs:
        await asyncio.sleep(start_s + job.arrived_s - time.perf_counter())
        seen = Seen(job.model, job.arrived_s, time.perf_counter() - start_s, job.prompt_tokens, job.output_tokens)
        text = json.dumps(body(job)).encode()
        tasks.append(asyncio.create_task(_ask(seen, path, text, port, start_s, timeout_s, on_end)))
    return [await task for task in tasks]


def lag_s(seen: Sequence[Seen]) -> float:
    """How late 99 of 100 requests were sent at most: above some milliseconds the client is too slow for the load."""
    late = sorted(s.sent_s - s.due_s for s in seen)
    return late[math.ceil(0.99 * len(late)) - 1] if late else 0.0


async def _ask(
    seen: Seen, path: str, body: bytes, port: int, start_s: float, timeout_s: float, on_end: Callable[[Seen], None]
) -> Seen:
    try:
        async with asyncio.timeout(timeout_s):
            await _stream(path, body, port, start_s, seen)
    except TimeoutError:
        seen.error = f"no end within {timeout_s:g} s"
    except (OSError, EOFError, ValueError) as e:
        seen.error = f"{type(e).__name__}: {e}"
    on_end(seen)
    return seen


async def _stream(path: str, body: bytes, port: int, start_s: float, seen: Seen) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
        first, *fields = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        seen.status = int(first.split()[1])
        headers = {name.lower(): value.strip() for name, _, value in (f.partition(":") for f in fields)}
        if seen.status != 200:
            seen.error = (b"".join([p async for p in _body(reader, headers)])).decode(errors="replace")[:300]
            return
        rest = b""
        async for piece in _body(reader, headers):
            now_s = time.perf_counter() - start_s
            *events, rest = (rest + piece).split(b"\n\n")
            for event in events:
                hear(event, now_s, seen)
    finally:
        writer.close()


async def _body(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> AsyncGenerator[bytes, None]:
    """Pieces of a response's body as they come."""
    if headers.get("transfer-encoding") != "chunked":
        yield await reader.readexactly(int(headers.get("content-length", 0)))
        return
    while size := int(await reader.readline() or b"0", 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


def hear(event: bytes, now_s: float, seen: Seen) -> None:
    """Take in one server-sent event."""
    data = event.removeprefix(b"data: ")
    if data == event or data == b"[DONE]":
        return
    news = json.loads(data)
    if "error" in news:
        seen.error = str(news["error"].get("message", news["error"]))
    if news.get("choices"):
        seen.first_s, seen.last_s = min(seen.first_s, now_s), now_s
    if news.get("usage"):
        seen.tokens = news["usage"]["completion_tokens"]
        seen.cached = (news["usage"].get("prompt_tokens_details") or {}).get("cached_tokens", 0)
