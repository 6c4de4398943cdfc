"""One running application, as the e2e tests see it: over HTTP from outside, and its replicas' books from inside."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import httpx
import ray
from PIL import Image, ImageDraw
from ray.exceptions import RayActorError

from ernie_cluster.actors.app import APP_NAME
from ernie_cluster.actors.find_router import router_name
from ernie_cluster.actors.messages import NAMESPACE, Load, ReplicaInfo
from ernie_cluster.config.cluster import ClusterConfig

CHAT = "/v1/chat/completions"


@cache
def picture_url(seed: int = 0) -> str:
    """A small picture as a data URL; another one for each seed."""
    image = Image.new("RGB", (112, 84), (40 * seed % 256, 90, 200))
    ImageDraw.Draw(image).ellipse((10 + seed, 10, 60 + seed, 60), fill=(220, 60 + 7 * seed % 180, 30))
    out = io.BytesIO()
    image.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


@cache
def video_url(seed: int = 0, num_frames: int = 5) -> str:
    """A small GIF as a data URL, another one for each seed: a ball rolls for a tenth of a second per frame."""
    frames = []
    for i in range(num_frames):
        frame = Image.new("RGB", (84, 56), (40 * seed % 256, 90, 200))
        ImageDraw.Draw(frame).ellipse((10 * i, 10, 10 * i + 30, 40), fill=(220, 60, 30))
        frames.append(frame)
    out = io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:], duration=100)
    return "data:image/gif;base64," + base64.b64encode(out.getvalue()).decode()


def chat_body(
    model: str, text: str, *, picture: int | None = None, video: int | None = None, max_tokens: int = 16, **more: Any
) -> dict[str, Any]:
    """A greedy request that runs to `max_tokens`."""
    parts: list[dict[str, Any]] = []
    if picture is not None:
        parts.append({"type": "image_url", "image_url": {"url": picture_url(picture)}})
    if video is not None:
        parts.append({"type": "video_url", "video_url": {"url": video_url(video)}})
    content = [*parts, {"type": "text", "text": text}] if parts else text
    fixed = {"temperature": 0, "ignore_eos": True}
    return {
        "model": model, "messages": [{"role": "user", "content": content}], "max_tokens": max_tokens, **fixed, **more,
    }  # fmt: skip


def eventually(claim: Callable[[], str], timeout_s: float) -> None:
    """Until `claim` has nothing to object, which it says as text; fails with its last words at the deadline."""
    deadline = time.monotonic() + timeout_s
    while objection := claim():
        assert time.monotonic() < deadline, f"after {timeout_s} s still: {objection}"
        time.sleep(0.05)


@dataclass
class Streamed:
    """What a streamed answer came to."""

    text: str = ""
    finish_reason: str | None = None
    error: dict[str, Any] | None = None
    is_done: bool = False
    """Ended with [DONE]."""
    num_chunks: int = 0
    timeline: list[dict[str, Any]] = field(default_factory=list)

    @property
    def num_attempts(self) -> int:
        """How often a route was sought; only with `include_timeline`."""
        return sum(span["name"] == "route" for span in self.timeline)

    def feed(self, line: str) -> None:
        """One line of server-sent events."""
        if not line.startswith("data: "):
            return
        assert not self.is_done, "something came after [DONE]"
        if line == "data: [DONE]":
            self.is_done = True
            return
        event = json.loads(line[6:])
        self.num_chunks += 1
        self.error = event.get("error", self.error)
        self.timeline = event.get("timeline", self.timeline)
        for choice in event.get("choices", ()):
            self.text += choice["delta"].get("content") or ""
            self.finish_reason = choice["finish_reason"] or self.finish_reason


@dataclass
class Application:
    """A running application.

    Args:
        config: what it was started with.
    """

    config: ClusterConfig

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.config.api.port}"

    @property
    def grpc_target(self) -> str:
        return f"127.0.0.1:{self.config.api.grpc_port}"

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=10)

    def post(self, body: Any, path: str = CHAT, timeout_s: float = 60) -> httpx.Response:
        """`body` as JSON, or as it is when it is bytes."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return httpx.post(
            self.url + path, content=content, headers={"content-type": "application/json"}, timeout=timeout_s
        )

    def ask(self, model: str, text: str, **options: Any) -> dict[str, Any]:
        """A whole answer in one piece."""
        response = self.post(chat_body(model, text, **options))
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def text(self, model: str, text: str, **options: Any) -> str:
        answer: str = self.ask(model, text, **options)["choices"][0]["message"]["content"]
        return answer

    async def stream(self, client: httpx.AsyncClient, body: dict[str, Any]) -> AsyncGenerator[Streamed, None]:
        """The same `Streamed`, fuller after each line; closing it closes the connection."""
        async with client.stream("POST", self.url + CHAT, json=body | {"stream": True}, timeout=120) as response:
            assert response.status_code == 200, await response.aread()
            answer = Streamed()
            async for line in response.aiter_lines():
                answer.feed(line)
                yield answer

    async def read(self, client: httpx.AsyncClient, body: dict[str, Any]) -> Streamed:
        """A streamed answer, to its end."""
        answer = Streamed()
        async for answer in self.stream(client, body):  # noqa: B007
            pass
        return answer

    # ---- inside

    def router(self) -> Any:
        return ray.get_actor(router_name(APP_NAME), NAMESPACE)

    def replicas(self, model: str | None = None, role: str | None = None) -> list[ReplicaInfo]:
        """The replicas that the router knows."""
        infos = [info for info, _ in ray.get(self.router().replicas.remote(), timeout=10)]
        return [i for i in infos if model in (None, i.model) and role in (None, i.role)]

    @staticmethod
    def rank(info: ReplicaInfo) -> Any:
        return ray.get_actor(info.actor_name, NAMESPACE)

    def load(self, info: ReplicaInfo) -> Load:
        load: Load = ray.get(self.rank(info).snapshot.remote(), timeout=10)
        return load

    def objection_to_rest(self) -> str:
        """Why the application is not at rest: a request, lease, block or promise that is still held; "" if it is."""
        for info in self.replicas():
            try:
                assert ray.get(self.rank(info).check.remote(), timeout=10)
                load = self.load(info)
            except (ValueError, RayActorError) as e:  # no longer there, and still known to be
                return f"{info.replica_id} is leaving: {e}"
            if not load.is_idle or load.free_blocks < load.total_blocks:
                return f"{info.replica_id}: {load}"
        promises = ray.get(self.router().check.remote(), timeout=10)
        return f"{promises} promises are open" if promises else ""

    def objection_to_ready(self) -> str:
        """Why the application is not whole: /ready, and as many replicas as were configured, none of which comes or goes;
        "" if it is."""
        if (response := self.get("/ready")).status_code != 200:
            return response.text
        for model in self.config.models:
            if model.idle_to_zero_s is not None:  # it may sleep
                continue
            for pool in model.pools:
                found = len(self.replicas(model.name, pool.role))
                if found != (wanted := pool.num_replicas * pool.dp):
                    return f"{found} of {wanted} {pool.role} replicas of {model.name}"
        sleepers = {m.name for m in self.config.models if m.idle_to_zero_s is not None}
        moving = [r for r in self.get("/admin/status").json()["replicas"] if r["phase"] != "ready"]
        return ", ".join(f"{r['replica']} is {r['phase']}" for r in moving if r["model"] not in sleepers)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """`asyncio.run` with a limit, so that nothing that hangs hangs the tests."""

    async def limited() -> Any:
        async with asyncio.timeout(150):
            return await work

    return asyncio.run(limited())
