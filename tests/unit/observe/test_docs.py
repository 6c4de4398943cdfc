"""The page on observability says what the code does."""

from __future__ import annotations

from pathlib import Path

import pytest

import ernie_cluster
from ernie_cluster.observe.metrics import METRICS, Metric

ROOT = Path(ernie_cluster.__file__).parent
PAGE = (ROOT.parent / "docs" / "observability.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if line.startswith("| `ernie_")]


def row(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels) or "-"
    return f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help} |"


def test_the_table_is_that_of_the_code() -> None:
    assert [row(metric) for metric in METRICS] == ROWS


@pytest.fixture(scope="module")
def recorders() -> str:
    """All sources that may record, in one."""
    files = [path for path in ROOT.rglob("*.py") if path.parent.name != "observe"]
    return "".join(path.read_text(encoding="utf-8") for path in files)


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.name)
def test_somebody_records_it(metric: Metric, recorders: str) -> None:
    assert f'"{metric.name}"' in recorders
