"""The suite for a machine with a GPU runs where there is none, as far as that goes, and says so."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench" / "gpu_suite"


@pytest.fixture(scope="module")
def suite() -> Iterator[ModuleType]:
    path = sys.path[:]
    loader = importlib.machinery.SourceFileLoader("gpu_suite", str(SCRIPT))
    spec = importlib.util.spec_from_loader("gpu_suite", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    yield module
    sys.path[:] = path


def test_small_measures_what_needs_no_gpu(
    suite: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert suite.main(["--small", "--json", str(tmp_path / "out.json")]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    measured = [row["what"].split(",")[0].split(" of ")[0] for row in rows]
    assert measured == [
        "check", "bound: reading memory", "bound: copying on the device", "bound: bfloat16 products", "decode", "decode",
        "prefill", "hand-over by CUDA IPC", "decode as CUDA graphs", "the whole suite",
    ]  # fmt: skip
    assert all(row["share"] > 0 for row in rows if row["what"].startswith(("decode, batch", "prefill")))
    said = capsys.readouterr().out
    assert "## GPU: no GPU" in said
    assert "| hand-over by CUDA IPC | left out |" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_it_says_what_to_do(suite: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert suite.main([]) == 2
    assert "there is no GPU" in capsys.readouterr().err


def test_a_part_that_fails_is_a_row_and_keeps_nothing_else(
    suite: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(device: torch.device) -> object:
        raise AssertionError("off by 3")

    monkeypatch.setattr(suite.checks, "in_float32", wrong)
    monkeypatch.setattr(suite.speed, "prefill", lambda plan, bounds: [])
    assert suite.main(["--small", "--repeats", "1"]) == 1
    said = capsys.readouterr().out
    assert "check in float32 FAILED" in said
    assert "decode, batch 2" in said


def test_a_missed_goal_is_said(suite: ModuleType) -> None:
    missed, met = (suite.Row("decode", "1 ms", share, 0.6) for share in (0.59, 0.6))
    assert missed.is_missed
    assert not met.is_missed
    report = suite.Report("one GPU", "2026-01-01", "gpu_suite")
    report.add(missed)
    assert "| decode | 1 ms | 59% | >= 60% MISSED |" in report.as_markdown()


def test_it_can_be_run() -> None:
    assert os.access(SCRIPT, os.X_OK)
