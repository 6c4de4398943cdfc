"""`ernie-cluster bench` against the whole application: what it counts is what the server has counted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ernie_cluster.cli.main import main
from tests.e2e.application import Application

pytestmark = pytest.mark.timeout(240)

MODEL = "tiny"
COUNTERS = {
    "requests": "ernie_request_total",
    "prompt_tokens": "ernie_prompt_tokens_total",
    "output_tokens": "ernie_generation_tokens_total",
}


def counted(app: Application) -> dict[str, float]:
    """What the server has counted of the model, by the names that bench has for it."""
    text = app.get("/metrics").text

    def total(name: str) -> float:
        return sum(map(float, re.findall(rf'^{name}{{.*model="{MODEL}".*}} (\S+)$', text, re.M)))

    return {key: total(name) for key, name in COUNTERS.items()}


@pytest.mark.parametrize("scenario", ["chat", "pictures"])
def test_bench_and_the_server_count_the_same(app: Application, scenario: str, tmp_path: Path) -> None:
    before, file = counted(app), tmp_path / "found.json"
    load = ["--scenario", scenario, "--shrink", "10", "--requests", "12", "--concurrency", "4", "--warm-up", "0"]
    assert main(["bench", "--url", app.url, "--model", MODEL, *load, "--json", str(file)]) == 0
    (told,) = json.loads(file.read_text())["servers"]
    assert told["errors"] == {}
    assert told["whole"] == 12
    after = counted(app)
    for key in COUNTERS:
        assert told[key] == pytest.approx(after[key] - before[key], rel=0.05), key
    assert 0 < told["ttft_s"]["p50"] <= told["latency_s"]["p99"]
