"""`ernie-cluster bench` and Locust against the whole application: what they count is what the server has counted."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ernie_cluster.cli.main import main
from tests.e2e.application import Application

pytestmark = pytest.mark.timeout(240)

ROOT = Path(__file__).parents[2]
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


@pytest.mark.skipif(importlib.util.find_spec("locust") is None, reason='not installed: pip install -e ".[loadtests]"')
@pytest.mark.parametrize("way", ["http", "grpc"])
def test_locust_and_the_server_count_the_same(app: Application, way: str, tmp_path: Path) -> None:
    before = counted(app)
    host = app.url if way == "http" else app.grpc_target
    command = [sys.executable, "-m", "locust", "-f", f"loadtests/over_{way}.py", "--host", host, "--headless"]
    load = ["-u", "3", "-r", "9", "-t", "5s", "--stop-timeout", "60", "--scenario", "chat", "--shrink", "10"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    file = ["--model", MODEL, "--json-file", str(tmp_path / "stats")]
    ran = subprocess.run(
        [*command, *load, *file], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    (row,) = json.loads((tmp_path / "stats.json").read_text())
    after = counted(app)
    assert row["num_failures"] == 0
    assert row["num_requests"] >= 3
    for key, name in (("requests", "num_requests"), ("output_tokens", "total_content_length")):
        assert row[name] == pytest.approx(after[key] - before[key], rel=0.05), key
