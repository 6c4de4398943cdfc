"""`/metrics` read back: what was written is what is read, and differences are what came."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_cluster.observe.metrics import PrometheusMetrics
from ernie_cluster.observe.reading import Reading, quantile, read, total

TTFT = "ernie_time_to_first_token_seconds"


def reading(metrics: PrometheusMetrics) -> Reading:
    return read(metrics.render().decode())


# Laws


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.text(max_size=8), st.integers(1, 10**6), max_size=4))
def test_what_was_counted_is_read_under_any_name(counts: dict[str, int]) -> None:
    metrics = PrometheusMetrics()
    for model, count in counts.items():
        metrics.inc("ernie_prompt_tokens_total", count, model=model)
    assert reading(metrics).sums("ernie_prompt_tokens_total", "model") == counts


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0, 1000), max_size=20), st.lists(st.floats(0, 1000), max_size=20))
def test_a_difference_is_what_was_observed_in_between(first: list[float], then: list[float]) -> None:
    metrics, only = PrometheusMetrics(), PrometheusMetrics()
    for value in first:
        metrics.observe(TTFT, value, model="m")
    before = reading(metrics)
    for value in then:
        metrics.observe(TTFT, value, model="m")
        only.observe(TTFT, value, model="m")
    came = reading(metrics).since(before).sums(f"{TTFT}_bucket", "le")
    assert {le: count for le, count in came.items() if count} == {
        le: count for le, count in reading(only).sums(f"{TTFT}_bucket", "le").items() if count
    }


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.001, 9.99), min_size=1, max_size=30), st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]))
def test_a_quantile_lies_in_the_bucket_of_the_true_one(values: list[float], share: float) -> None:
    bounds = [0.01, 0.1, 1.0, 10.0, math.inf]
    counts = {bound: float(sum(v <= bound for v in values)) for bound in bounds}
    true = sorted(values)[max(0, math.ceil(share * len(values) - 1e-9) - 1)]
    guess = quantile(counts, share)
    assert guess is not None
    low, high = max([0.0, *(b for b in bounds if b < true)]), min(b for b in bounds if b >= true)
    assert low <= guess <= high


# Examples


@pytest.mark.parametrize(
    ("counts", "share", "expected"),
    [
        ({}, 0.5, None),
        ({1.0: 0, math.inf: 0}, 0.5, None),
        ({1.0: 0, 2.0: 8, math.inf: 8}, 0.5, 1.5),
        ({1.0: 4, math.inf: 4}, 0.5, 0.5),
        ({1.0: 1, 2.0: 1, math.inf: 4}, 0.99, 2.0),
    ],
)
def test_quantiles(counts: dict[float, float], share: float, expected: float | None) -> None:
    assert quantile(counts, share) == expected


def test_a_process_has_its_own_number_from_its_first_count_on() -> None:
    metrics, other = PrometheusMetrics(), PrometheusMetrics()
    metrics.set("ernie_open_promises", 3)
    assert reading(metrics).process == 0
    metrics.inc("ernie_request_total", model="m", outcome="success")
    first = reading(metrics).process
    metrics.inc("ernie_request_total", model="n", outcome="success")
    other.inc("ernie_request_total", model="m", outcome="success")
    assert reading(metrics).process == first > 0
    assert reading(other).process != first


def test_processes_add_up_and_samples_are_chosen_by_label() -> None:
    metrics = PrometheusMetrics()
    for outcome in ("success", "success", "overloaded", "replica_error"):
        metrics.inc("ernie_request_total", model="m", outcome=outcome)
    both = total([reading(metrics), reading(metrics).times(2)])
    assert both.sums("ernie_request_total", "outcome") == {"success": 6, "overloaded": 3, "replica_error": 3}
    chosen = both.only("outcome", "overloaded", "replica_error")
    assert chosen.sums("ernie_request_total", "model") == {"m": 6}


def test_what_is_no_such_text_is_said() -> None:
    with pytest.raises(ValueError, match=r"."):
        read("<html>\n<body> not metrics {")
