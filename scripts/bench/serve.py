"""What the way through Serve costs: time to first token, and tokens per second over many streams.

    python scripts/bench/serve.py [ttft] [streams]      both without arguments

ttft     a text prompt at concurrency 1, through HTTP and three pools and through one mixed replica, beside the same
         prompt on the engine alone in this process; the parts from the request's own timeline
streams  32 SSE streams through the proxy with an engine that does nothing
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import statistics
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import ray
import torch
from http_stream import drive
from ray import serve

from ernie_cluster.actors import launch
from ernie_cluster.actors.app import build_api
from ernie_cluster.actors.direct import Address, DirectServer
from ernie_cluster.actors.environment import free_port
from ernie_cluster.actors.events import EventHub
from ernie_cluster.actors.find_router import find_router
from ernie_cluster.actors.messages import NAMESPACE, Batch, Load, ReplicaInfo
from ernie_cluster.actors.telling import Teller
from ernie_cluster.cli.progress import Progress
from ernie_cluster.cli.tiny_checkpoint import write_tiny_checkpoint
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.model import ModelConfig
from ernie_cluster.config.presets import PRESETS
from ernie_cluster.config.router import RouterConfig
from ernie_cluster.deltas import Delta
from ernie_cluster.engine.runner import Runner
from ernie_cluster.engine.worker import Worker, WorkerSettings
from ernie_cluster.inputs.chat import ChatProcessor
from ernie_cluster.request import FinishReason, GenerationRequest, SamplingParams, TokenEvent
from ernie_cluster.transport.choose import Endpoint

REPEATS = 60
NUM_TOKENS = 8
PAUSE_S = 0.02
progress = Progress()


@contextmanager
def running(config: ClusterConfig) -> Iterator[str]:
    """The application of a configuration; its base URL."""
    config = dataclasses.replace(config, api=dataclasses.replace(config.api, port=free_port()))
    launch.start_ray(config, None, progress)
    try:
        launch.start(config, progress, timeout_s=120)
        yield f"http://127.0.0.1:{config.api.port}/v1"
    finally:
        launch.stop(progress)


def prompt_of(num_tokens: int, seed: int) -> list[int]:
    """Token ids without special ones; different each time, so that no prefix cache helps."""
    return [int(t) for t in torch.randint(300, 1900, (num_tokens,), generator=torch.Generator().manual_seed(seed))]


def ask(connection: HTTPConnection, prompt: list[int], max_tokens: int) -> tuple[float, list[dict[str, Any]]]:
    """(seconds to the first SSE event, timeline) of one streamed completion; a lean client, to measure the server."""
    body = {
        "model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True,
        "ignore_eos": True, "include_timeline": True,
    }  # fmt: skip
    raw = json.dumps(body)
    start, first, timeline = time.perf_counter(), 0.0, []
    connection.request("POST", "/v1/completions", raw, {"content-type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    for line in response:
        if line.startswith(b"data: {"):
            first = first or time.perf_counter() - start
            timeline = json.loads(line[6:]).get("timeline") or timeline
    return first, timeline


def engine_alone(folder: str, num_tokens: int) -> float:
    """Median seconds from a request to its first token on an engine in this process.

    At the pace of a client that waits for each answer: a core that has rested takes twice as long as a busy one.
    """
    torch.set_num_threads(1)
    config, processor = ModelConfig.from_folder(folder), ChatProcessor.from_folder(folder, served_name="tiny")
    first_s, is_over = [0.0], threading.Event()

    def emit(outcomes: list[Any]) -> None:
        first_s[0] = first_s[0] or time.perf_counter()
        if outcomes[-1].finish_reason is not None:
            is_over.set()

    settings = WorkerSettings(16, 512, 16, False, 256, 60.0, 1 << 22, True)
    runner = Runner.load(
        folder, config, "mixed", dtype="float32", device=torch.device("cpu"), num_blocks=512, block_size=16
    )
    worker = Worker(runner, config, settings, emit)
    worker.warm_up()
    worker.start()
    times = []
    for i in range(REPEATS):
        request = processor.completion(
            prompt_of(num_tokens, i),
            request_id=f"alone-{i}",
            sampling=SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True),
        )
        time.sleep(PAUSE_S)
        is_over.clear()
        first_s[0] = 0.0
        start = time.perf_counter()
        worker.open_prefill(request, 0, None)
        assert is_over.wait(10)
        times.append(first_s[0] - start)
    worker.stop()
    return statistics.median(times)


def measure_ttft(folder: str, num_tokens: int = 32) -> None:
    alone = engine_alone(folder, num_tokens)
    print(f"\nTTFT of a {num_tokens}-token text prompt at concurrency 1, median of {REPEATS}")
    print(f"  engine alone                        {alone * 1e3:7.2f} ms")
    for name in ("tiny", "tiny-mixed"):
        config = PRESETS[name](folder)
        with running(config) as url, closing(HTTPConnection(url.split("/")[2], timeout=30)) as connection:
            for i in range(20):
                ask(connection, prompt_of(num_tokens, 1000 + i), 1)
            runs = [ask(connection, prompt_of(num_tokens, i), NUM_TOKENS) for i in range(REPEATS)]
            bare = statistics.median(_timed(lambda: _get_health(connection)) for _ in range(REPEATS))
        ttft = statistics.median(r[0] for r in runs)
        print(
            f"  {name:<12} over HTTP               {ttft * 1e3:7.2f} ms, {(ttft - alone) * 1e3:.2f} ms more than alone"
        )
        print(f"    of it a GET /health through Serve {bare * 1e3:7.2f} ms")
        for stage in ("preprocess", "route", "queue", "prefill", "transfer"):
            took = [s["duration_s"] for r in runs for s in r[1] if s["name"] == stage]
            if took:
                print(f"    {stage:<34}{statistics.median(took) * 1e3:7.2f} ms")


def _get_health(connection: HTTPConnection) -> None:
    connection.request("GET", "/health")
    connection.getresponse().read()


def _timed(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


IDLE = Load(0, 0, 0, free_blocks=10_000, total_blocks=10_000)


@ray.remote(num_cpus=0)
class NoopRank:
    """A mixed replica whose engine does nothing: a token per request and step, every two milliseconds."""

    def __init__(self) -> None:
        self._hub: EventHub | None = None
        self._open: dict[str, list[int]] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self._step, daemon=True).start()

    def _events(self) -> EventHub:
        self._hub = self._hub or EventHub(time.monotonic, idle_s=2.0)
        return self._hub

    def _step(self) -> None:
        while True:
            time.sleep(0.002)
            events: list[Any] = []
            with self._lock:
                for request_id, state in list(self._open.items()):
                    index, last = state
                    reason = FinishReason.LENGTH if index + 1 == last else None
                    events.append(TokenEvent(request_id, index, (400 + index % 50,), reason))
                    state[0] += 1
                    if reason:
                        del self._open[request_id]
            if events and self._hub is not None:
                self._hub.publish(events)

    async def open_prefill(self, client_id: str, request: GenerationRequest, epoch: int, destination: None) -> None:
        self._events().open(client_id, request.request_id)
        with self._lock:
            self._open[request.request_id] = [0, request.sampling.max_tokens]

    async def poll(self, client_id: str, acknowledged: int) -> Batch:
        return await self._events().poll(client_id, acknowledged)

    async def abort(self, request_ids: list[str]) -> None:
        with self._lock:
            for request_id in request_ids:
                self._open.pop(request_id, None)

    async def address(self) -> Address:
        teller = Teller(lambda: IDLE, lambda seen: Delta(seen, 0), RouterConfig())
        calls = (self.open_prefill, self.poll, self.abort, teller.tell)
        server = DirectServer({call.__name__: call for call in calls})
        return await server.start(ray.util.get_node_ip_address())

    async def snapshot(self) -> Load:
        return IDLE


def measure_streams(folder: str, num_streams: int = 32, max_tokens: int = 600) -> None:
    config = PRESETS["tiny-mixed"](folder)
    config = dataclasses.replace(config, api=dataclasses.replace(config.api, port=free_port()))
    app = "bench"
    launch.start_ray(config, None, progress)
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": config.api.port})
        serve.run(build_api(config, app, []), name=app, route_prefix="/")
        name = f"{app}:noop"
        rank = NoopRank.options(name=name, namespace=NAMESPACE).remote()  # type: ignore[attr-defined]
        address = ray.get(rank.address.remote())
        endpoint = Endpoint("here", None, name)
        info = ReplicaInfo("noop", "noop", uuid.uuid4().hex, "tiny", "mixed", "here", name, address, endpoint)
        router = find_router(app, config)
        ray.get(router.register.remote(info))
        url = f"http://127.0.0.1:{config.api.port}"
        asyncio.run(drive(url, num_streams, 50, model="tiny"))
        results = [asyncio.run(drive(url, num_streams, max_tokens, model="tiny")) for _ in range(5)]
        print("\nSSE through Serve's proxy, engine that does nothing (client in the same two cores)")
        for result in results:
            print(f"  {result}")
        print(f"  median {statistics.median(r.tokens_per_s for r in results):,.0f} tokens/s")
    finally:
        launch.stop(progress, app)


def main() -> None:
    what = sys.argv[1:] or ["ttft", "streams"]
    with tempfile.TemporaryDirectory() as tmp:
        folder = str(write_tiny_checkpoint(Path(tmp) / "tiny"))
        for name, measure in (("ttft", measure_ttft), ("streams", measure_streams)):
            if name in what:
                measure(folder)


if __name__ == "__main__":
    main()
