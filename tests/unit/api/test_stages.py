"""What the timeline of an answer becomes on /metrics."""

from __future__ import annotations

import pytest

from ernie_cluster.api.stages import record_stages
from ernie_cluster.errors import ReplicaLost
from ernie_cluster.observe.metrics import InMemoryMetrics
from ernie_cluster.request import Span
from tests.fakes import FakeBackend, say
from tests.unit.api.client import Server


def test_each_stage_has_its_histogram() -> None:
    metrics = InMemoryMetrics()
    spans = [
        Span("route", 1.0, 0.5),
        Span("encode", 1.0, 0.25, (("picture", 1), ("cached", 0))),
        Span("embeddings", 1.25, 0.125, (("bytes", 2048),)),
        Span("queue", 1.0, 0.0625),
        Span("prefill", 1.5, 2.0, (("tokens", 40),)),
        Span("transfer", 3.5, 0.5, (("bytes", 4096), ("pieces", 2))),
        Span("decode", 4.0, 1.0),
    ]
    record_stages(metrics, "m", spans)
    assert metrics.observations("ernie_encode_seconds", model="m") == [0.25]
    assert metrics.observations("ernie_queue_seconds", model="m") == [0.0625]
    assert metrics.observations("ernie_prefill_seconds", model="m") == [2.0]
    for kind, took_s, num_bytes in (("kv", 0.5, 4096), ("embeddings", 0.125, 2048)):
        assert metrics.observations("ernie_transfer_seconds", kind=kind) == [took_s]
        assert metrics.observations("ernie_transfer_size_bytes", kind=kind) == [num_bytes]
        assert metrics.value("ernie_transfer_bytes_total", kind=kind) == num_bytes


def test_a_picture_from_a_cache_was_not_encoded() -> None:
    metrics = InMemoryMetrics()
    record_stages(metrics, "m", [Span("encode", 1.0, 0.25, (("cached", 1),))])
    assert metrics.observations("ernie_encode_seconds", model="m") == []


def test_a_clock_that_was_set_back_gives_no_negative_times() -> None:
    metrics = InMemoryMetrics()
    record_stages(metrics, "m", [Span("prefill", 1.0, -3.0)])
    assert metrics.observations("ernie_prefill_seconds", model="m") == [0.0]


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [True, False])
async def test_what_an_answer_that_fails_had_done_counts(stream: bool) -> None:
    lost = ReplicaLost("gone")
    lost.journey = (Span("prefill", 1.0, 2.0), Span("failed", 3.0, 0.0, (("failed", "ReplicaLost"),)))
    server = Server(FakeBackend([*say("Once", finish_reason=None), lost]))
    response = await server.chat(stream=stream)
    assert "a part of the service failed" in response.text
    assert server.metrics.observations("ernie_prefill_seconds", model="tiny") == [2.0]
