"""The table of metrics, and that both recorders obey it alike."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_cluster.observe.metrics import METRICS, InMemoryMetrics, Metric, Metrics, PrometheusMetrics


@pytest.fixture(params=[PrometheusMetrics, InMemoryMetrics])
def metrics(request: pytest.FixtureRequest) -> Metrics:
    made: Metrics = request.param()
    return made


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.name)
def test_rows_follow_the_rules_of_the_field(metric: Metric) -> None:
    assert re.fullmatch(r"ernie_[a-z0-9_]+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert bool(metric.buckets) == (metric.kind == "histogram")
    assert list(metric.buckets) == sorted(set(metric.buckets))
    assert metric.help.endswith(".")


def test_names_are_unique() -> None:
    assert len({m.name for m in METRICS}) == len(METRICS)


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.name)
def test_every_row_can_be_recorded_and_is_rendered(metric: Metric, metrics: Metrics) -> None:
    labels = dict.fromkeys(metric.labels, "x")
    record = {"counter": metrics.inc, "gauge": metrics.set, "histogram": metrics.observe}[metric.kind]
    record(metric.name, 2.0, **labels)
    name = metric.name + ("_sum" if metric.kind == "histogram" else "")
    inside = ",".join(f'{label}="x"' for label in metric.labels)
    line = f"{name}{{{inside}}} 2.0" if inside else f"{name} 2.0"
    assert line in metrics.render().decode().splitlines()


def test_a_counter_counts_ones_unless_told(metrics: Metrics) -> None:
    metrics.inc("ernie_transfer_bytes_total", kind="kv")
    metrics.inc("ernie_transfer_bytes_total", 41, kind="kv")
    assert b'ernie_transfer_bytes_total{kind="kv"} 42.0' in metrics.render()


@pytest.mark.parametrize(
    ("name", "labels", "message"),
    [
        ("ernie_nothing_total", {}, "no metric 'ernie_nothing_total'"),
        ("ernie_encode_seconds", {"model": "m"}, "is a histogram, not a counter"),
        ("ernie_transfer_bytes_total", {}, "has labels"),
        ("ernie_transfer_bytes_total", {"kind": "kv", "model": "m"}, "has labels"),
    ],
)
def test_what_is_not_in_the_table_is_a_bug(name: str, labels: dict[str, str], message: str, metrics: Metrics) -> None:
    with pytest.raises(AssertionError, match=message):
        metrics.inc(name, **labels)


def test_registries_are_apart() -> None:
    one, other = PrometheusMetrics(), PrometheusMetrics()
    one.set("ernie_open_promises", 5)
    assert b"ernie_open_promises 5.0" in one.render()
    assert b"ernie_open_promises 0.0" in other.render()


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 9))))
def test_the_twin_remembers_by_label(events: list[tuple[str, int]]) -> None:
    metrics = InMemoryMetrics()
    for model, value in events:
        metrics.inc("ernie_prompt_tokens_total", value, model=model)
        metrics.set("ernie_requests_in_flight", value, model=model)
        metrics.observe("ernie_encode_seconds", value, model=model)
    for model in "ab":
        mine = [value for m, value in events if m == model]
        assert metrics.value("ernie_prompt_tokens_total", model=model) == sum(mine)
        assert metrics.value("ernie_requests_in_flight", model=model) == (mine[-1] if mine else 0)
        assert metrics.observations("ernie_encode_seconds", model=model) == mine


def test_a_counter_of_the_twin_cannot_fall() -> None:
    with pytest.raises(AssertionError, match="a counter cannot fall"):
        InMemoryMetrics().inc("ernie_prompt_tokens_total", -1, model="m")


def test_replacing_forgets_what_is_gone_and_nothing_else(metrics: Metrics) -> None:
    metrics.set("ernie_requests_in_flight", 7, model="m")
    metrics.replace("ernie_ready_replicas", {("m", "prefill"): 2, ("m", "decode"): 1})
    metrics.replace("ernie_ready_replicas", {("m", "decode"): 3})
    lines = [line for line in metrics.render().decode().splitlines() if "replicas{" in line or "flight{" in line]
    assert sorted(lines) == [
        'ernie_ready_replicas{model="m",role="decode"} 3.0',
        'ernie_requests_in_flight{model="m"} 7.0',
    ]
    metrics.replace("ernie_ready_replicas", {})
    assert b"replicas{" not in metrics.render()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("ernie_open_promises", {}),
        ("ernie_request_retries_total", {("m", "r"): 1.0}),
        ("ernie_ready_replicas", {("m",): 1.0}),
    ],
)
def test_replacing_what_is_no_gauge_with_such_labels_is_a_bug(
    name: str, values: dict[tuple[str, ...], float], metrics: Metrics
) -> None:
    with pytest.raises((AssertionError, ValueError)):
        metrics.replace(name, values)
