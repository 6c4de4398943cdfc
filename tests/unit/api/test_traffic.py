"""Measurements of requests, on a clock of our own."""

from __future__ import annotations

import asyncio

import pytest

from ernie_cluster.api.answer import Delta
from ernie_cluster.api.markup import Pieces
from ernie_cluster.api.stream import MAX_FLUSH_INTERVAL_S, flush_interval_s
from ernie_cluster.api.traffic import Traffic
from ernie_cluster.errors import InvalidRequest, Overloaded, ReplicaLost
from ernie_cluster.observe.metrics import InMemoryMetrics


class FakeClock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_times_and_tokens_of_one_request() -> None:
    clock, metrics = FakeClock(), InMemoryMetrics()
    with Traffic(metrics, clock, 8).request() as meter:
        meter.accept("tiny")
        meter.prepared(12)
        for seconds, num_tokens in ((0.5, 1), (0.2, 4), (0.1, 0), (0.1, 1)):
            clock.now_s += seconds
            meter.tokens([Delta(0, Pieces("x"), [7] * num_tokens)])
        assert metrics.value("ernie_requests_in_flight", model="tiny") == 1
    assert metrics.observations("ernie_time_to_first_token_seconds", model="tiny") == pytest.approx([0.5])
    assert metrics.observations("ernie_inter_token_latency_seconds", model="tiny") == pytest.approx([0.05, 0.2])
    assert metrics.observations("ernie_time_per_output_token_seconds", model="tiny") == pytest.approx([0.4 / 5])
    assert metrics.observations("ernie_e2e_request_latency_seconds", model="tiny") == pytest.approx([0.9])
    assert metrics.value("ernie_prompt_tokens_total", model="tiny") == 12
    assert metrics.value("ernie_generation_tokens_total", model="tiny") == 6
    assert metrics.value("ernie_requests_in_flight", model="tiny") == 0
    assert metrics.value("ernie_requests_in_flight", model="unknown") == 0


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (InvalidRequest("bad"), "invalid"),
        (ReplicaLost("gone"), "replica_error"),
        (asyncio.CancelledError(), "aborted"),
        (KeyError("bug"), "internal_error"),
    ],
)
def test_every_ending_has_one_outcome(error: BaseException, outcome: str) -> None:
    metrics = InMemoryMetrics()
    traffic = Traffic(metrics, FakeClock(), 8)

    def fail() -> None:
        with traffic.request() as meter:
            meter.is_stream = True
            raise error

    with pytest.raises(type(error)):
        fail()
    assert metrics.value("ernie_request_total", model="unknown", outcome=outcome) == 1
    assert metrics.value("ernie_requests_in_flight", model="unknown") == 0
    assert traffic.num_streams == 0


def test_the_limit_on_requests_in_flight() -> None:
    traffic = Traffic(InMemoryMetrics(), FakeClock(), 1)
    with traffic.request(), pytest.raises(Overloaded, match="limit is 1"), traffic.request():
        pytest.fail("let in")
    with traffic.request():
        pass  # a refused request leaves nothing behind


def test_flush_interval_keeps_all_streams_together_within_one_core() -> None:
    assert flush_interval_s(0) == 0
    assert flush_interval_s(20) == pytest.approx(0.02)
    intervals = [flush_interval_s(n) for n in range(1000)]
    assert intervals == sorted(intervals)
    assert intervals[-1] == MAX_FLUSH_INTERVAL_S
