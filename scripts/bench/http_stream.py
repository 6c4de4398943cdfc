"""What the HTTP layer alone costs: N streams at once over the app with a backend that does nothing.

    python scripts/bench/http_stream.py --streams 16 --max-tokens 256

The client half, `drive`, works against any server that speaks OpenAI's API.
"""

from __future__ import annotations

import argparse
import asyncio
import codecs
import json
import socket
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import uvicorn

from ernie_cluster.api.backend import ModelStatus, ReplicaLoad
from ernie_cluster.api.http_service import create_app
from ernie_cluster.api.limits import ApiLimits
from ernie_cluster.observe.metrics import PrometheusMetrics
from ernie_cluster.request import FinishReason, GenerationRequest, SamplingParams, TokenEvent


@dataclass(frozen=True)
class Result:
    """What the clients saw."""

    num_streams: int
    num_tokens: int
    num_events: int
    """Server-sent events."""
    wall_s: float
    client_ttft_s: tuple[float, ...]
    """Request sent to first text, per stream."""

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.wall_s

    def __str__(self) -> str:
        ttft = sorted(self.client_ttft_s)
        return (
            f"{self.num_streams} streams, {self.num_tokens} tokens in {self.wall_s:.2f} s: "
            f"{self.tokens_per_s:,.0f} tokens/s, {self.num_tokens / max(1, self.num_events):.1f} tokens/event, "
            f"TTFT median {ttft[len(ttft) // 2] * 1e3:.1f} ms, worst {ttft[-1] * 1e3:.1f} ms"
        )


async def drive(url: str, num_streams: int, max_tokens: int, model: str = "bench", prompt: str = "hello") -> Result:
    """Run all streams at once and read them to their end.

    Args:
        url: the server, without `/v1`.
        num_streams: requests at the same time.
        max_tokens: of each answer; end tokens are ignored, so it is also the answer's length.
        model, prompt: what is asked.

    Raises:
        RuntimeError: a stream failed or did not end with `[DONE]`.
    """
    limits = httpx.Limits(max_connections=num_streams, max_keepalive_connections=num_streams)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=600) as client:
        start_s = time.perf_counter()
        seen = await asyncio.gather(*(_one(client, model, prompt, max_tokens) for _ in range(num_streams)))
        wall_s = time.perf_counter() - start_s
    return Result(
        num_streams,
        sum(tokens for tokens, _, _ in seen),
        sum(events for _, events, _ in seen),
        wall_s,
        tuple(ttft_s for _, _, ttft_s in seen),
    )


async def _one(client: httpx.AsyncClient, model: str, prompt: str, max_tokens: int) -> tuple[int, int, float]:
    """(tokens, events, seconds to the first text) of one stream."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start_s = time.perf_counter()
    num_tokens = num_events = 0
    ttft_s: float | None = None
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                return num_tokens, num_events, ttft_s or 0.0
            if not line.startswith("data: "):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                break
            num_events += 1
            if ttft_s is None:
                ttft_s = time.perf_counter() - start_s
            num_tokens = (event.get("usage") or {}).get("completion_tokens", num_tokens)
    raise RuntimeError(f"a stream failed after {num_events} events (HTTP {response.status_code})")


class IdleBackend:
    """Answers with the letter x, one token per event, giving way to the loop after each."""

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[list[TokenEvent]]:
        last = request.sampling.max_tokens - 1
        for i in range(last + 1):
            await asyncio.sleep(0)
            yield [TokenEvent(request.request_id, i, (120,), FinishReason.LENGTH if i == last else None)]

    async def knock(self, model: str, max_tokens: int, priority: int, timeout_s: float) -> None:
        pass

    async def loads(self) -> list[ReplicaLoad]:
        return []

    async def status(self) -> list[ModelStatus]:
        return [ModelStatus("bench", True, "")]

    async def close(self) -> None:
        pass


class ByteText:
    """A detokenizer whose tokens are bytes."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        return self._decoder.decode(bytes(ids))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class ByteProcessor:
    """A processor whose tokens are bytes."""

    served_name = "bench"
    max_model_len = 2**20
    vocab_size = 256
    eos_token_ids: tuple[int, ...] = ()

    def chat(
        self,
        messages: list[dict[str, Any]],
        *,
        request_id: str,
        sampling: SamplingParams,
        enable_thinking: bool | None,
        tools: list[dict[str, Any]] | None,
        timeout_s: float,
        add_generation_prompt: bool = True,
        cache_salt: bytes = b"",
    ) -> GenerationRequest:
        return self.completion(
            str(messages[-1]["content"]), request_id=request_id, sampling=sampling, timeout_s=timeout_s
        )

    def completion(
        self, prompt: str | list[int], *, request_id: str, sampling: SamplingParams, timeout_s: float
    ) -> GenerationRequest:
        ids = np.array(list(prompt.encode()) if isinstance(prompt, str) else prompt, dtype=np.int32)
        positions = np.tile(np.arange(len(ids), dtype=np.int32), (3, 1))
        return GenerationRequest(request_id, self.served_name, ids, positions, sampling, timeout_s=timeout_s)

    def opens_reasoning(self, request: GenerationRequest) -> bool:
        return False

    def detokenizer(self) -> ByteText:
        return ByteText()


@asynccontextmanager
async def idle_server() -> AsyncGenerator[str]:
    """The app under uvicorn in this process; yields its URL."""
    app = create_app(IdleBackend(), {"bench": ByteProcessor()}, ApiLimits(), PrometheusMetrics())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        task = asyncio.create_task(server.serve([listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await task


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=256)
    args = parser.parse_args()
    async with idle_server() as url:
        await drive(url, 1, 8)  # warm-up
        print(await drive(url, args.streams, args.max_tokens))


if __name__ == "__main__":
    asyncio.run(main())
