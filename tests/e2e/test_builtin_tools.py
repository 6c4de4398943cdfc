"""The packaged model looks twice in one request, and calculates: the server itself runs the tools that it calls."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from ernie_cluster.cli.local import is_packaged
from ernie_cluster.skills.catalog import HELD_OUT, draw
from ernie_cluster.skills.judge import judge
from ernie_cluster.skills.sample import Sample
from ernie_cluster.skills.tools import next_turn
from tests.e2e.application import CHAT, Application

pytestmark = pytest.mark.skipif(not is_packaged(), reason="no pocket checkpoint in this tree")

SEEDS = range(HELD_OUT + 7000, HELD_OUT + 7006)


def ask(app: Application, sample: Sample, **more: object) -> dict[str, Any]:
    """The message of an answer."""
    body = {
        "model": "ernie-pocket",
        "messages": sample.wire_messages(),
        "max_tokens": 256,
        "temperature": 0,
        "enable_thinking": sample.enable_thinking,
        **more,
    }
    response = httpx.post(app.url + CHAT, json=body, timeout=60)
    assert response.status_code == 200, response.text
    message: dict[str, Any] = response.json()["choices"][0]["message"]
    return message


def test_it_zooms_in_and_calculates(app: Application) -> None:
    """That all parts play together is the point, not how well this model does: the floors are low."""
    num_zoomed = 0
    for seed in SEEDS:
        message = ask(app, draw("zoom", seed), tools=[{"type": "image_zoom_in_tool"}], include_tool_results=True)
        crops = [image for c in message.get("builtin_tool_calls", ()) for image in c["result"].get("images", ())]
        assert all(crop["url"].startswith("data:image/jpeg;base64,") for crop in crops)
        num_zoomed += bool(crops) and bool(message["content"])
    assert num_zoomed >= len(SEEDS) // 2

    sums = [s for s in (draw("tool", seed) for seed in range(HELD_OUT + 7000, HELD_OUT + 7040)) if is_sum(s)][:6]
    num_right = 0
    for sample in sums:
        assert sample.tool_call is not None
        expected = next_turn(sample, [sample.tool_call])
        assert expected is not None
        message = ask(app, sample, tools=[{"type": "calculator"}])
        num_right += judge(expected, message["content"] or "") and bool(message.get("builtin_tool_calls"))
    assert num_right >= len(sums) // 3


def is_sum(sample: Sample) -> bool:
    return sample.tool_call is not None and sample.tool_call.name == "calculator"
