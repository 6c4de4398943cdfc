"""What pictures do to everybody else: the event loop's worst stall while several 12-megapixel JPEGs arrive at once.

    python scripts/bench/media.py --pictures 8 --processes 1

The API over a backend that does nothing, under uvicorn in this process; its clients are another one. The loop's stall
is how much later than asked a millisecond's sleep ends.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import dataclasses
import io
import json
import sys
import tempfile
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import numpy as np
import uvicorn
from http_stream import IdleBackend
from PIL import Image

from ernie_cluster.actors.process import share_interpreter
from ernie_cluster.api.decoders import DecoderLimits, Decoders
from ernie_cluster.api.http_service import create_app
from ernie_cluster.api.limits import ApiLimits
from ernie_cluster.cli.tiny_checkpoint import write_tiny_checkpoint
from ernie_cluster.inputs.chat import ChatProcessor
from ernie_cluster.inputs.images import PixelConfig
from ernie_cluster.observe.metrics import PrometheusMetrics

PORT = 8177


def photograph(seed: int) -> bytes:
    """A JPEG of 4000 x 3000 pixels and about as many bytes as a camera's."""
    rough = np.random.default_rng(seed).integers(0, 256, (750, 1000, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(rough).resize((4000, 3000), Image.Resampling.BICUBIC).save(out, "JPEG", quality=85)
    return out.getvalue()


class Stall:
    """The loop's worst so far, in seconds."""

    def __init__(self) -> None:
        self.worst_s = 0.0

    async def watch(self) -> None:
        while True:
            start_s = time.perf_counter()
            await asyncio.sleep(0.001)
            self.worst_s = max(self.worst_s, time.perf_counter() - start_s - 0.001)


@asynccontextmanager
async def server(num_processes: int) -> AsyncGenerator[None]:
    """The app with so many decoding processes; 0 decodes in the preprocess threads."""
    pool = Decoders(num_processes, DecoderLimits(timeout_s=300.0)) if num_processes else None
    with tempfile.TemporaryDirectory() as folder:
        processor = ChatProcessor.from_folder(
            write_tiny_checkpoint(Path(folder)), served_name="bench", max_model_len=10**6
        )
    processor = dataclasses.replace(processor, pixels=PixelConfig(), map_media=pool.map if pool else map)
    app = create_app(IdleBackend(), {"bench": processor}, ApiLimits(), PrometheusMetrics())
    served = uvicorn.Server(uvicorn.Config(app, port=PORT, log_level="warning", access_log=False))
    task = asyncio.create_task(served.serve())
    try:
        yield
    finally:
        served.should_exit = True
        await task
        if pool is not None:
            pool.close()


async def ask(client: httpx.AsyncClient, seed: int) -> float:
    """Seconds until one picture was taken in."""
    url = "data:image/jpeg;base64," + base64.b64encode(photograph(seed)).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}]
    body = json.dumps({"model": "bench", "messages": [{"role": "user", "content": content}], "max_tokens": 1})
    start_s = time.perf_counter()
    response = await client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    response.raise_for_status()
    return time.perf_counter() - start_s


async def clients(num_pictures: int) -> None:
    """All pictures at once, after one that warms up."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{PORT}", timeout=600) as client:
        print(f"alone: {await ask(client, 0):.3f} s", flush=True)
        times_s = sorted(await asyncio.gather(*(ask(client, 1 + i) for i in range(num_pictures))))
        print(
            f"{num_pictures} at once: median {times_s[len(times_s) // 2]:.3f} s, last {times_s[-1]:.3f} s", flush=True
        )


async def measure(num_pictures: int, num_processes: int) -> None:
    """Serve here, and let the clients run beside."""
    share_interpreter()
    stall = Stall()
    async with server(num_processes):
        watching = asyncio.create_task(stall.watch())
        beside = await asyncio.create_subprocess_exec(
            sys.executable, __file__, "--clients", "--pictures", str(num_pictures)
        )
        await beside.wait()
        watching.cancel()
    print(f"worst stall of the event loop: {stall.worst_s * 1e3:.1f} ms ({num_processes} decoding processes)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--processes", type=int, default=1, help="0 decodes in the API's own threads")
    parser.add_argument("--clients", action="store_true", help="only ask, a server that runs already")
    args = parser.parse_args()
    asyncio.run(clients(args.pictures) if args.clients else measure(args.pictures, args.processes))


if __name__ == "__main__":
    main()
