"""Counters are there before their first event, and only those whose labels nobody knows beforehand are not."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from ernie_cluster import errors
from ernie_cluster.api.status import TABLE
from ernie_cluster.api.zeros import begin_at_zero
from ernie_cluster.errors import ReplicaDraining, ReplicaError
from ernie_cluster.observe.metrics import METRICS, PrometheusMetrics

LATER = {"ernie_route_choices_total"}
"""Of these a label's values are the policy's words, which those who count them know."""


def samples() -> dict[str, list[dict[str, str]]]:
    metrics = PrometheusMetrics()
    begin_at_zero(metrics, ["a", "b"])
    found: dict[str, list[dict[str, str]]] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            if sample.name.endswith("_total"):
                assert sample.value == 0, sample
                found.setdefault(sample.name, []).append(sample.labels)
    return found


def test_every_counter_whose_labels_are_known_begins_at_zero() -> None:
    assert samples().keys() == {m.name for m in METRICS if m.kind == "counter"} - LATER


def test_all_ends_and_all_reasons_of_every_model_are_there() -> None:
    found = samples()
    outcomes = {"success", "internal_error", *(status.outcome for _, status in TABLE)}
    for model in ("a", "b", "unknown"):
        assert {s["outcome"] for s in found["ernie_request_total"] if s["model"] == model} == outcomes
    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ReplicaError)}
    reasons = {kind.__name__ for kind in kinds - {ReplicaDraining}}  # which is no failure
    assert {s["reason"] for s in found["ernie_request_retries_total"]} == reasons
