"""The parts of the soak benchmark: slopes, rows, kinds of processes, and what is read of the metrics."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_cluster.observe.metrics import PrometheusMetrics

SCRIPTS = Path(__file__).parents[2] / "scripts" / "bench"


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    path = sys.path[:]
    sys.path.insert(0, str(SCRIPTS))
    import own_server
    import soak
    from overloaded.client import Answer

    yield SimpleNamespace(soak=soak, server=own_server, Answer=Answer)
    sys.path[:] = path


def minute(bench: SimpleNamespace, end_s: float, rss_mib: float, files: int = 9) -> object:
    made = bench.soak.Minute(end_s, files=files, rss=Counter({"EngineRank": int(rss_mib * 2**20)}))
    made.note(bench.Answer(200, {}, b"", 0.1, 0.5, (0.01, 0.03)))
    return made


@settings(max_examples=50)
@given(per_hour=st.floats(-100, 100), start=st.floats(-100, 100), count=st.integers(2, 20))
def test_the_slope_of_a_line_is_its_own(bench: SimpleNamespace, per_hour: float, start: float, count: int) -> None:
    times = [60.0 * i for i in range(count)]
    values = [start + per_hour * t / 3600 for t in times]
    assert bench.soak.slope(times, values) == pytest.approx(per_hour, abs=1e-6)


def test_a_leak_shows_and_the_warm_up_does_not(bench: SimpleNamespace) -> None:
    flat = [minute(bench, 60.0 * i, 900 if i > 2 else 100) for i in range(1, 11)]
    leaky = [minute(bench, 60.0 * i, 100 + i, files=9 + i) for i in range(1, 11)]
    assert "| memory of EngineRank | +0.0 MiB/h |" in bench.soak.summary(flat)
    assert "| memory of EngineRank | +60.0 MiB/h |" in bench.soak.summary(leaky)
    assert "| files | +60.0 /h |" in bench.soak.summary(leaky)


def test_a_row_counts_each_request_once(bench: SimpleNamespace) -> None:
    row = bench.soak.Minute(60.0)
    for status in (200, 429, 500):
        row.note(bench.Answer(status, {}, b"", 0.1, 0.5, (0.01,)))
    row.note(None)
    told = row.row(["EngineRank"])
    assert [told[name] for name in ("requests", "failed", "refused", "ttft_p50_ms")] == [4, 2, 1, 100.0]


def test_used_blocks_of_all_replicas_are_counted(bench: SimpleNamespace) -> None:
    metrics = PrometheusMetrics()
    for replica, state, blocks in (("a", "used", 3), ("b", "used", 4), ("b", "free", 50)):
        metrics.set("ernie_kv_blocks", blocks, model="m", replica=replica, state=state)
    assert bench.soak.kv_blocks_in(metrics.render()) == 7


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("ray::EngineRank.poll", "EngineRank"),
        ("ray::ServeReplica:ernie:api", "ServeReplica:ernie:api"),
        ("/usr/bin/haproxy\0-f\0x", "haproxy"),
        ("", "gone"),
    ],
)
def test_kinds_of_processes(bench: SimpleNamespace, command: str, kind: str) -> None:
    assert bench.server.kind_of(command) == kind


def test_this_process_has_a_weight(bench: SimpleNamespace) -> None:
    found = bench.server.weights_of(bench.server.Server("x", os.getpid()))
    assert sum(w.files for w in found.values()) > 2
    assert all(w.processes >= 1 and w.threads >= 1 for w in found.values())


def test_the_plot_is_a_picture(bench: SimpleNamespace) -> None:
    minutes = [minute(bench, 60.0 * i, 100) for i in range(1, 4)]
    ElementTree.fromstring(bench.soak.drawn([60.0, 120.0, 180.0], bench.soak.panels(minutes)))
