"""A client that reads nothing, among others that do."""

from __future__ import annotations

import asyncio
import json
import re
import socket

import httpx

from tests.e2e.application import CHAT, Application, Streamed, chat_body, eventually, run
from tests.e2e.test_failures import STORY, check_whole, whole_text

FLOOD = chat_body("mixed", "Once upon a time", max_tokens=1200, stream=True, n=8, logprobs=True, top_logprobs=20)
"""Over 20 MB of events, where all buffers between us and the engine hold three."""


def deaf_client(app: Application) -> socket.socket:
    """Has sent its request, and reads nothing."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", app.config.api.port))
    raw = json.dumps(FLOOD).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
    client.sendall(head.encode() + raw)
    return client


def num_parted(app: Application) -> int:
    found = re.findall(
        r'^ernie_request_total\{model="mixed",outcome="slow_client"\} (\d+)', app.get("/metrics").text, re.M
    )
    return int(found[0]) if found else 0


def test_who_reads_nothing_is_parted_with_and_nobody_else_notices(whole_app: Application) -> None:
    app = whole_app
    story = STORY | {"model": "mixed"}
    text, before = whole_text(app, story), num_parted(app)

    async def play() -> list[Streamed]:
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=20)) as client:
            return list(await asyncio.gather(*(app.read(client, story) for _ in range(8))))

    with deaf_client(app):
        eventually(lambda: "" if any(app.load(i).num_running for i in app.replicas("mixed", "mixed")) else "idle", 30)
        check_whole(run(play()), text)
        eventually(lambda: "" if num_parted(app) == before + 1 else "it is still served", 60)
        eventually(app.objection_to_rest, 20)
