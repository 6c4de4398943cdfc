"""Every metric that this project has, the protocol to record them, and two recorders.

One table names all: a name, kind or label set that is not in it is a bug of the caller and asserts. Names and units are
the field's. A recorder belongs to one process and is handed to those who record.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram, ascending; empty for other kinds."""


_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)
_STAGE_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_REQUEST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
_SIZES = tuple(float(4**n) for n in range(5, 17))
"""1 KiB to 4 GiB."""
_TOKENS = tuple(float(4**n) for n in range(9))

METRICS: tuple[Metric, ...] = (
    # requests, at the API
    Metric("ernie_request_total", "counter", "Requests by how they ended.", ("model", "outcome")),
    Metric("ernie_requests_in_flight", "gauge", "Requests accepted and not yet ended.", ("model",)),
    Metric("ernie_unread_tokens", "gauge", "Output tokens that wait for slow clients.", ("model",)),
    Metric("ernie_request_refused_total", "counter", "Requests refused before any work.", ("model", "reason")),
    Metric("ernie_request_retries_total", "counter", "Requests continued on other replicas.", ("model", "reason")),
    Metric(
        "ernie_time_to_first_token_seconds",
        "histogram",
        "Request accepted to first non-empty token sent.",
        ("model",),
        _REQUEST_S,
    ),
    Metric("ernie_inter_token_latency_seconds", "histogram", "Gap between neighbouring tokens.", ("model",), _TOKEN_S),
    Metric(
        "ernie_time_per_output_token_seconds",
        "histogram",
        "(last token - first token) / (output tokens - 1), one per request.",
        ("model",),
        _TOKEN_S,
    ),
    Metric("ernie_e2e_request_latency_seconds", "histogram", "Request accepted to its end.", ("model",), _REQUEST_S),
    Metric("ernie_preprocess_seconds", "histogram", "Media decoding, template and tokenizer.", ("model",), _STAGE_S),
    Metric("ernie_request_prompt_tokens", "histogram", "Prompt tokens per request.", ("model",), _TOKENS),
    Metric("ernie_request_generation_tokens", "histogram", "Output tokens per request.", ("model",), _TOKENS),
    Metric("ernie_prompt_tokens_total", "counter", "Prompt tokens, media included.", ("model",)),
    Metric("ernie_cached_prompt_tokens_total", "counter", "Prompt tokens found in a prefix cache.", ("model",)),
    Metric("ernie_generation_tokens_total", "counter", "Output tokens.", ("model",)),
    # replicas
    Metric(
        "ernie_kv_blocks",
        "gauge",
        "KV blocks by state: used, leases with them, or free, cached with them.",
        ("model", "replica", "state"),
    ),
    Metric("ernie_running_requests", "gauge", "Sequences that take part in steps.", ("model", "replica", "role")),
    Metric("ernie_waiting_requests", "gauge", "Requests that wait for a place.", ("model", "replica", "role")),
    Metric("ernie_waiting_tokens", "gauge", "Prompt or media tokens that wait.", ("model", "replica", "role")),
    Metric("ernie_ready_replicas", "gauge", "Replicas that take new work.", ("model", "role")),
    Metric("ernie_replicas", "gauge", "Replicas by what they do at present.", ("model", "phase", "role")),
    Metric("ernie_replica_gpus", "gauge", "GPUs, or cores, that replicas hold.", ("model", "role")),
    Metric(
        "ernie_replica_start_time_seconds",
        "gauge",
        "When a replica was ready for its first request, Unix time.",
        ("model", "replica", "role"),
    ),
    Metric(
        "ernie_replica_silence_seconds",
        "gauge",
        "Since a replica last told of itself.",
        ("model", "replica", "role"),
    ),
    Metric("ernie_needed_replicas", "gauge", "Replicas that the autoscaler finds needed.", ("model", "role")),
    Metric("ernie_held_requests", "gauge", "Requests that wait for a place, or for a model to wake up.", ("model",)),
    Metric("ernie_budget", "gauge", "GPUs, or cores, that all replicas together may hold.", ("unit",)),
    Metric("ernie_budget_used", "gauge", "GPUs, or cores, that all replicas together hold.", ("unit",)),
    Metric(
        "ernie_scaling_actions_total",
        "counter",
        "What the autoscaler and operators did, as this process of the API saw it.",
        ("action", "model"),
    ),
    Metric(
        "ernie_encode_seconds", "histogram", "One picture or video through the vision encoder.", ("model",), _STAGE_S
    ),
    Metric(
        "ernie_queue_seconds",
        "histogram",
        "A prompt at its engine to the first step that has it.",
        ("model",),
        _STAGE_S,
    ),
    Metric("ernie_prefill_seconds", "histogram", "First step of a prompt to its first token.", ("model",), _STAGE_S),
    Metric(
        "ernie_expert_imbalance",
        "gauge",
        "Load of the rank with most to do over the mean, of all layers, in the last minute or two; 1 = even.",
        ("model", "replica", "role"),
    ),
    Metric(
        "ernie_hottest_expert_share",
        "gauge",
        "Largest part of a layer's tokens of one modality that one expert got, in the last minute or two.",
        ("model", "replica", "role"),
    ),
    Metric(
        "ernie_routed_tokens",
        "gauge",
        "Tokens that went to experts of each modality since the replica started.",
        ("modality", "model", "replica", "role"),
    ),
    Metric(
        "ernie_expert_moves",
        "gauge",
        "How often experts changed places since the replica started.",
        ("model", "replica", "role"),
    ),
    Metric(
        "ernie_prefix_fetches_total",
        "counter",
        "Prefixes that a prompt waited for from another replica: fetched, or late, declined, refused, incomplete.",
        ("model", "outcome"),
    ),
    Metric(
        "ernie_fetched_blocks_total", "counter", "KV blocks that came from other replicas' prefix caches.", ("model",)
    ),
    # what replicas are spared, and do twice
    Metric(
        "ernie_breaker_openings_total",
        "counter",
        "Replicas that got no work for a while as they kept failing.",
        ("model",),
    ),
    Metric("ernie_encode_hedges_total", "counter", "Pictures asked of a second vision replica.", ("model",)),
    # transfers and the router's books
    Metric("ernie_transfer_bytes_total", "counter", "Bytes moved between replicas: kv, embeddings.", ("kind",)),
    Metric("ernie_transfer_seconds", "histogram", "One hand-over, first piece to last.", ("kind",), _STAGE_S),
    Metric("ernie_transfer_size_bytes", "histogram", "Bytes of one hand-over.", ("kind",), _SIZES),
    Metric("ernie_transfer_failures_total", "counter", "Attempts that ended with a hand-over.", ("model", "reason")),
    Metric("ernie_route_seconds", "histogram", "Admission and routing of one request.", ("model",), _STAGE_S),
    Metric(
        "ernie_route_choices_total",
        "counter",
        "Replicas chosen for a stage (vision, prefill, decode), by what spoke for them.",
        ("model", "stage", "why"),
    ),
    Metric(
        "ernie_resumes_total",
        "counter",
        "Requests that went on elsewhere from the tokens that their client had, by why: drained.",
        ("model", "why"),
    ),
    Metric("ernie_open_promises", "gauge", "Paths that the router has given out and not had back."),
)

_BY_NAME = {m.name: m for m in METRICS}


class Metrics(Protocol):
    """Records what happened. All methods may be called from any thread."""

    def inc(self, name: str, value: float = 1, **labels: str) -> None:
        """Add to a counter; `value` is not negative."""
        ...

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        ...

    def replace(self, name: str, values: Mapping[tuple[str, ...], float]) -> None:
        """Set a gauge for these values of its labels, in the table's order, and forget it for all others."""
        ...

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Put a value into a histogram."""
        ...

    def render(self) -> bytes:
        """All of it, in Prometheus' text format."""
        ...


class PrometheusMetrics:
    """Records into a registry of its own, so that two can live in one process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, Histogram] = {}
        for m in METRICS:
            if m.kind == "counter":
                self._counters[m.name] = Counter(m.name, m.help, m.labels, registry=self._registry)
            elif m.kind == "gauge":
                self._gauges[m.name] = Gauge(m.name, m.help, m.labels, registry=self._registry)
            else:
                self._histograms[m.name] = Histogram(
                    m.name, m.help, m.labels, registry=self._registry, buckets=m.buckets
                )

    def inc(self, name: str, value: float = 1, **labels: str) -> None:
        _check(name, "counter", labels)
        counter = self._counters[name]
        (counter.labels(**labels) if labels else counter).inc(value)

    def set(self, name: str, value: float, **labels: str) -> None:
        _check(name, "gauge", labels)
        gauge = self._gauges[name]
        (gauge.labels(**labels) if labels else gauge).set(value)

    def replace(self, name: str, values: Mapping[tuple[str, ...], float]) -> None:
        _check_all(name, values)
        gauge = self._gauges[name]
        gauge.clear()
        for labels, value in values.items():
            gauge.labels(*labels).set(value)

    def observe(self, name: str, value: float, **labels: str) -> None:
        _check(name, "histogram", labels)
        histogram = self._histograms[name]
        (histogram.labels(**labels) if labels else histogram).observe(value)

    def render(self) -> bytes:
        return generate_latest(self._registry)


class InMemoryMetrics:
    """The twin for tests: the same checks, and values that can be asked for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = defaultdict(float)
        self._observations: dict[tuple[str, tuple[tuple[str, str], ...]], list[float]] = defaultdict(list)

    def inc(self, name: str, value: float = 1, **labels: str) -> None:
        assert value >= 0, f"{name}: a counter cannot fall, got {value}"
        key = _check(name, "counter", labels)
        with self._lock:
            self._values[key] += value

    def set(self, name: str, value: float, **labels: str) -> None:
        key = _check(name, "gauge", labels)
        with self._lock:
            self._values[key] = value

    def replace(self, name: str, values: Mapping[tuple[str, ...], float]) -> None:
        keys = _check_all(name, values)
        with self._lock:
            for key in [key for key in self._values if key[0] == name]:
                del self._values[key]
            self._values |= dict(zip(keys, values.values(), strict=True))

    def observe(self, name: str, value: float, **labels: str) -> None:
        key = _check(name, "histogram", labels)
        with self._lock:
            self._observations[key].append(value)

    def value(self, name: str, **labels: str) -> float:
        """A counter or gauge with exactly these labels; 0 when never recorded."""
        return self._values.get(_check(name, None, labels), 0.0)

    def observations(self, name: str, **labels: str) -> list[float]:
        """A histogram's values with exactly these labels, in order."""
        return list(self._observations.get(_check(name, "histogram", labels), ()))

    def render(self) -> bytes:
        """Counters, gauges, and of histograms `_count` and `_sum`; sorted."""
        with self._lock:
            rows = {_row(name, labels): value for (name, labels), value in self._values.items()}
            for (name, labels), seen in self._observations.items():
                rows[_row(f"{name}_count", labels)] = len(seen)
                rows[_row(f"{name}_sum", labels)] = sum(seen)
        return "".join(f"{row} {float(value)}\n" for row, value in sorted(rows.items())).encode()


def _check(name: str, kind: Kind | None, labels: dict[str, str]) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Assert that the table has such a metric; its key, labels in the table's order."""
    metric = _BY_NAME.get(name)
    assert metric is not None, f"no metric {name!r}; add it to METRICS"
    assert kind is None or metric.kind == kind, f"{name} is a {metric.kind}, not a {kind}"
    assert labels.keys() == set(metric.labels), f"{name} has labels {metric.labels}, got {tuple(labels)}"
    return name, tuple((label, labels[label]) for label in metric.labels)


def _check_all(name: str, values: Iterable[tuple[str, ...]]) -> list[tuple[str, tuple[tuple[str, str], ...]]]:
    """As `_check`, of a gauge with labels; `values` are those of its labels."""
    labels = _BY_NAME[name].labels
    assert labels, f"{name} has no labels; use set"
    return [_check(name, "gauge", dict(zip(labels, some, strict=True))) for some in values]


def _row(name: str, labels: tuple[tuple[str, str], ...]) -> str:
    inside = ",".join(f'{k}="{v}"' for k, v in labels)
    return f"{name}{{{inside}}}" if inside else name
