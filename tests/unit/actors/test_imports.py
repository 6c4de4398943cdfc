"""Processes that do not compute load no torch: it costs each of them seconds at the start, and 200 MB."""

from __future__ import annotations

import subprocess
import sys

LIGHT = ("launch", "app", "ingress", "router", "replica", "engine_rank", "vision_rank")
HEAVY = ("torch", "transformers", "numba", "safetensors")


def test_only_a_running_rank_imports_torch() -> None:
    code = f"""
import importlib, sys
for name in {LIGHT}:
    importlib.import_module("ernie_cluster.actors." + name)
    found = [m for m in {HEAVY} if m in sys.modules]
    assert not found, f"actors.{{name}} imports {{found}}"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-1000:]
