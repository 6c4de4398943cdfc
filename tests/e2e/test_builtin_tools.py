"""The packaged model looks twice in one request: it zooms in, by the server's own hand, and reads what it finds.

Which model is not the point but that all parts of the server play together, so a floor of one in three is enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest

from ernie_cluster.cli.local import is_packaged
from ernie_cluster.skills.catalog import HELD_OUT, draw
from ernie_cluster.skills.judge import judge

pytestmark = pytest.mark.skipif(not is_packaged(), reason="no pocket checkpoint in this tree")

SEEDS = range(HELD_OUT + 7000, HELD_OUT + 7006)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # no token file in the home of whoever runs the tests
        from ernie_cluster.actors.environment import free_port
        from ernie_cluster.cli.local import at_port, serving
        from ernie_cluster.cli.progress import Progress
        from ernie_cluster.config.presets import pocket_mixed

        with serving(at_port(pocket_mixed(), free_port()), Progress()) as url:
            yield url


def test_it_zooms_in_and_answers(url: str) -> None:
    num_zoomed = num_right = 0
    for seed in SEEDS:
        sample = draw("zoom", seed)
        body = {
            "model": "ernie-pocket",
            "messages": sample.wire_messages(),
            "tools": [{"type": "image_zoom_in_tool"}],
            "max_tokens": 256,
            "temperature": 0,
            "chat_template_kwargs": {"enable_thinking": sample.enable_thinking},
            "include_tool_results": True,
        }
        response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
        assert response.status_code == 200, response.text
        message = response.json()["choices"][0]["message"]
        crops = [image for c in message.get("builtin_tool_calls", ()) for image in c["result"].get("images", ())]
        assert all(crop["url"].startswith("data:image/jpeg;base64,") for crop in crops)
        num_zoomed += bool(crops)
        num_right += judge(replace(sample, tool_call=None, target=None), message["content"] or "")
    assert num_zoomed >= len(SEEDS) // 2
    assert num_right >= len(SEEDS) // 3
