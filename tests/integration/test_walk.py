"""A new user's path: the quick start, command by command, against a server that it starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ernie_cluster.actors.environment import free_port
from ernie_cluster.cli.local import is_packaged

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not is_packaged(), reason="the packaged model is not there"),
]


def test_the_quick_start_does_what_it_says() -> None:
    port, grpc_port = free_port(), free_port()
    # no token file in the home of whoever runs the tests
    env = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/walk"), "--port", str(port), "--grpc-port", str(grpc_port)],
        env=env, capture_output=True, text=True, timeout=840,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    assert "red circle" in done.stdout.lower(), "nobody saw the picture"
