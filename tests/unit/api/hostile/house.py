"""The app that hostile requests are sent to: a fake model `tiny`, and `eyes` with the real input side."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from ernie_cluster.api import http_service
from ernie_cluster.api.fetcher import Fetcher
from ernie_cluster.api.http_service import create_app
from ernie_cluster.api.service import Service
from ernie_cluster.inputs.chat import ChatProcessor
from ernie_cluster.inputs.clip import VideoLimits
from ernie_cluster.inputs.fetch import FetchRules
from ernie_cluster.inputs.images import ImageLimits
from ernie_cluster.inputs.messages import PromptLimits
from ernie_cluster.observe.metrics import PrometheusMetrics
from tests.fakes import FakeBackend, FakeProcessor, say
from tests.unit.api.hostile.row import LIMITS, Row

EYES = PromptLimits(
    image=ImageLimits(max_bytes=20_000, max_pixels=1_000_000, max_side=5000),
    max_images=2,
    max_prompt_chars=5000,
    video=VideoLimits(max_bytes=20_000, max_frames=10, max_frame_pixels=250_000, max_total_pixels=1_000_000),
    max_videos=1,
)
ADDRESSES = {
    "images.test": ["93.184.216.34"],
    "private.test": ["10.0.0.1"],
    "half.test": ["93.184.216.34", "192.168.0.1"],
    "meta.test": ["169.254.169.254"],
    "mapped.test": ["::ffff:127.0.0.1"],
    "six.test": ["fe80::1%eth0"],
}
"""What the resolver says."""
REDIRECTS = {
    "/file": "file:///etc/passwd",
    "/inside": "http://private.test/",
    "/address": "http://127.0.0.1/",
    "/loop": "/loop",
    "/broken": "http://[",
    "/port": "http://images.test:22/",
    "/user": "http://a:b@images.test/",
    "/downwards": "ftp://images.test/",
}


class House:
    """The app. Owns its temporary checkpoint's processor; nothing in it belongs to an event loop."""

    def __init__(self, folder: Path) -> None:
        from ernie_cluster.cli.tiny_checkpoint import write_tiny_checkpoint  # brings torch, which takes a while

        eyes = ChatProcessor.from_folder(
            write_tiny_checkpoint(folder), served_name="eyes", max_model_len=1024, limits=EYES
        )
        self.backend = FakeBackend(say("Hello"))
        self.metrics = PrometheusMetrics()
        self.tiny = FakeProcessor()
        rules = FetchRules(hosts=tuple(ADDRESSES), max_image_bytes=20_000, max_urls=4)
        fetcher = Fetcher(rules, _resolve, httpx.MockTransport(_serve))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(http_service, "Service", self._service)
            self.app = create_app(
                self.backend, {"tiny": self.tiny, "eyes": eyes}, LIMITS, self.metrics, fetcher=fetcher
            )

    def _service(self, *arguments: Any, **options: Any) -> Service:
        self.service = Service(*arguments, **options)
        return self.service

    async def send(self, row: Row) -> httpx.Response:
        """One row's answer."""
        content = row.body if isinstance(row.body, bytes) else json.dumps(row.body).encode()
        headers = {"content-type": "application/json", **row.headers}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://test") as client:
            return await client.request(row.method, row.path, content=content, headers=headers)

    def num_generated(self) -> int:
        """Requests that came through to the backend since the last call; the fakes forget them."""
        seen = len(self.backend.requests)
        self.backend.requests.clear()
        self.backend.finished.clear()
        self.tiny.calls.clear()
        while not self.backend.arrivals.empty():
            self.backend.arrivals.get_nowait()
        return seen

    def objection_to_rest(self, known: set[asyncio.Task[Any]]) -> str:
        """What is still held; "" when nothing is.

        Args:
            known: tasks of the caller.
        """
        held = {
            "streams": self.service.traffic.num_streams,
            "requests": len(self.service.traffic._live),
            "jobs": len(self.service.workers._jobs),
            "aborted": len(self.backend.aborted),
            "tasks": len(asyncio.all_tasks() - known),
        }
        shown = [line for line in self.metrics.render().decode().splitlines() if line.startswith("ernie_requests_in_")]
        busy = [line for line in shown if not line.endswith(" 0.0")]
        return ", ".join([f"{count} {what}" for what, count in held.items() if count] + busy)


async def _resolve(host: str, port: int) -> Sequence[str]:
    return ADDRESSES[host]


def _serve(request: httpx.Request) -> httpx.Response:
    """The only web server that there is."""
    path = request.url.path
    if path in REDIRECTS:
        return httpx.Response(302, headers={"location": REDIRECTS[path]})
    if path == "/missing":
        return httpx.Response(404)
    headers = {"content-encoding": "gzip"} if path == "/zipped" else {}
    content = bytes(20_001) if path == "/large" else b"<html>not a picture</html>"
    return httpx.Response(200, stream=httpx.ByteStream(content), headers=headers)
