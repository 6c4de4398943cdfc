"""What happened in a cluster between two looks at it. Pure: two snapshots in, numbers out.

Rates and quantiles are differences of what the API's processes count on `/metrics`; loads are those of the later look.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ernie_cluster.api.operator import ClusterView, ModelView, ReplicaView
from ernie_cluster.observe.reading import Reading, quantile, total

REFUSED = ("overloaded", "rate_limited", "unauthorized")
"""Outcomes of requests for which nothing was done."""
FAILED = ("replica_error", "internal_error", "deadline_exceeded")
"""Outcomes that are this side's fault."""


@dataclass(frozen=True, slots=True)
class Look:
    """A cluster at one moment."""

    view: ClusterView
    readings: Mapping[float, tuple[float, Reading]]
    """Process of the API -> (monotonic seconds when it was read, what it said), of those that answered this time."""


@dataclass(frozen=True, slots=True)
class ModelTop:
    """One served model; rates are per second of the interval."""

    name: str
    is_ready: bool
    requests_per_s: float
    """That ended, in whatever way."""
    refused_per_s: float
    failed_per_s: float
    retries_per_s: float
    """Requests that went on after a failure, or began again."""
    resumes_per_s: float
    """Requests that a drained replica handed on."""
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    ttft_p50_s: float | None
    """None where no request had its first token in the interval."""
    ttft_p99_s: float | None
    itl_p50_s: float | None
    itl_p99_s: float | None
    num_in_flight: int
    num_held: int
    """Of them, in the router's waiting room."""


@dataclass(frozen=True, slots=True)
class PoolTop:
    """The replicas of one pool together."""

    model: str
    home: str
    num_ready: int
    """That take work, in a new role or not."""
    num_replicas: int
    num_running: int
    num_waiting: int
    waiting_tokens: int
    used_blocks: int
    total_blocks: int


@dataclass(frozen=True, slots=True)
class TopView:
    """The interval between two looks."""

    interval_s: float
    """The longest of the processes'; 0 = none was seen twice, so there are no rates."""
    num_processes: int
    """Of the API, that rates are of."""
    num_missed: int
    """That answered only one of both looks; their part of the rates is missing."""
    models: tuple[ModelTop, ...]
    pools: tuple[PoolTop, ...]
    replicas: tuple[ReplicaView, ...]
    """The busiest first."""


SORTS: Mapping[str, Callable[[ReplicaView], tuple[float, ...]]] = {
    "running": lambda r: (r.num_running, r.num_waiting),
    "waiting": lambda r: (r.num_waiting, r.waiting_tokens),
    "tokens": lambda r: (r.waiting_tokens, r.num_running),
    "kv": lambda r: (_share(_used(r), r.total_blocks), r.num_running),
    "age": lambda r: (r.age_s,),
    "name": lambda r: (),
}
"""Word for --sort -> what of a replica comes first where it is large; `name` leaves them in the view's order."""


def top(before: Look, after: Look, *, sort: str = "running") -> TopView:
    """What happened between two looks.

    Args:
        sort: one of `SORTS`, for the replicas; pools and models keep the view's order, as they are few.
    """
    came: list[Reading] = []
    intervals: list[float] = []
    for process, (at_s, reading) in after.readings.items():
        former = _former(process, before.readings)
        if former is not None and at_s > former[0]:
            intervals.append(at_s - former[0])
            came.append(reading.since(former[1]).times(1 / intervals[-1]))
    rates, now = total(came), total(reading for _, reading in after.readings.values())
    known = {m.name for m in after.view.models}
    busy = {name for name, rate in rates.sums("ernie_request_refused_total", "model").items() if rate}
    strangers = [ModelView(name, True, "", 0) for name in sorted(busy - known)]
    num_known = len({p for p in (*before.readings, *after.readings) if p} or {0.0})
    return TopView(
        interval_s=max(intervals, default=0.0),
        num_processes=len(came),
        num_missed=max(0, num_known - len(came)),
        models=tuple(_model(m, rates, now) for m in (*after.view.models, *strangers)),
        pools=_pools(after.view.replicas),
        replicas=tuple(sorted(after.view.replicas, key=SORTS[sort], reverse=True)),
    )


def _former(process: float, before: Mapping[float, tuple[float, Reading]]) -> tuple[float, Reading] | None:
    """The earlier reading of the same process; one that had counted nothing then has got its number since."""
    return before.get(process) or (before.get(0.0) if len(before) == 1 else None)


def _model(model: ModelView, rates: Reading, now: Reading) -> ModelTop:
    name = model.name
    mine = rates.only("model", name)

    def rate(sample: str, *outcomes: str) -> float:
        chosen = mine.only("outcome", *outcomes) if outcomes else mine
        return chosen.sums(sample, "model").get(name, 0.0)

    def latency(sample: str, share: float) -> float | None:
        buckets = mine.sums(f"{sample}_bucket", "le")
        return quantile({float(bound): count for bound, count in buckets.items()}, share)

    turned_away = rate("ernie_request_refused_total")
    ttft, itl = "ernie_time_to_first_token_seconds", "ernie_inter_token_latency_seconds"
    return ModelTop(
        name=name,
        is_ready=model.is_ready,
        requests_per_s=rate("ernie_request_total") + turned_away,
        refused_per_s=rate("ernie_request_total", *REFUSED) + turned_away,
        failed_per_s=rate("ernie_request_total", *FAILED),
        retries_per_s=rate("ernie_request_retries_total"),
        resumes_per_s=rate("ernie_resumes_total"),
        prompt_tokens_per_s=rate("ernie_prompt_tokens_total"),
        output_tokens_per_s=rate("ernie_generation_tokens_total"),
        ttft_p50_s=latency(ttft, 0.5),
        ttft_p99_s=latency(ttft, 0.99),
        itl_p50_s=latency(itl, 0.5),
        itl_p99_s=latency(itl, 0.99),
        num_in_flight=round(now.sums("ernie_requests_in_flight", "model").get(name, 0.0)),
        num_held=model.num_held,
    )


def _pools(replicas: Iterable[ReplicaView]) -> tuple[PoolTop, ...]:
    pools: dict[tuple[str, str], list[ReplicaView]] = {}
    for replica in replicas:
        pools.setdefault((replica.model, replica.home), []).append(replica)
    return tuple(_pool(model, home, members) for (model, home), members in pools.items())


def _pool(model: str, home: str, members: Sequence[ReplicaView]) -> PoolTop:
    phases = Counter(r.phase for r in members)
    return PoolTop(
        model=model,
        home=home,
        num_ready=phases["ready"] + phases["switching"],
        num_replicas=len(members),
        num_running=sum(r.num_running for r in members),
        num_waiting=sum(r.num_waiting for r in members),
        waiting_tokens=sum(r.waiting_tokens for r in members),
        used_blocks=sum(_used(r) for r in members),
        total_blocks=sum(r.total_blocks for r in members),
    )


def _used(replica: ReplicaView) -> int:
    return replica.total_blocks - replica.free_blocks


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
