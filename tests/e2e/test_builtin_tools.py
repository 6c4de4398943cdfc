"""The packaged model looks twice in one request: the server itself runs the zoom that it calls."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from ernie_cluster.actors.environment import free_port
from ernie_cluster.cli.local import is_packaged
from ernie_cluster.skills.catalog import HELD_OUT, draw
from ernie_cluster.skills.judge import judge
from tests.e2e.application import CHAT
from tests.e2e.processes import Program

pytestmark = pytest.mark.skipif(not is_packaged(), reason="no pocket checkpoint in this tree")

START_S = 300.0
STOP_S = 120.0
SEEDS = range(HELD_OUT + 7000, HELD_OUT + 7006)


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """Of a server that offers the zoom in all chats that say nothing of tools."""
    port, path = free_port(), tmp_path / "cluster.yaml"
    path.write_text(f"models:\n  - preset: pocket-mixed\napi:\n  port: {port}\n  builtin_tools: [image_zoom_in_tool]\n")
    program = Program(["serve", str(path)], {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": ""})
    try:
        program.wait_for("ready: ", START_S)
        yield f"http://127.0.0.1:{port}{CHAT}"
        program.send(signal.SIGTERM)
        program.end(STOP_S)
    finally:
        program.kill()


def test_it_zooms_in_and_reads(url: str) -> None:
    """The floors are low: that all parts play together is the point, not how well this model reads."""
    num_zoomed = num_right = 0
    for seed in SEEDS:
        sample = draw("zoom", seed)
        body = {
            "model": "ernie-pocket",
            "messages": sample.wire_messages(),
            "max_tokens": 256,
            "temperature": 0,
            "enable_thinking": sample.enable_thinking,
            "include_tool_results": True,
        }
        response = httpx.post(url, json=body, timeout=60)
        assert response.status_code == 200, response.text
        message = response.json()["choices"][0]["message"]
        crops = [image for c in message.get("builtin_tool_calls", ()) for image in c["result"].get("images", ())]
        assert all(crop["url"].startswith("data:image/jpeg;base64,") for crop in crops)
        num_zoomed += bool(crops)
        num_right += judge(replace(sample, tool_call=None, target=None), message["content"] or "")
    assert num_zoomed >= len(SEEDS) // 2
    assert num_right >= len(SEEDS) // 3
