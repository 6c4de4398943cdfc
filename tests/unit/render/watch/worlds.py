"""Made-up series, a sample a minute for an hour: all is well, and for each alert what makes it fire, and what does not yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Series = Mapping[str, str]
"""Series -> values in promtool's notation: `60+2x60` begins at 60 and gains 2 a minute."""

NOTHING = "_x60"


def steady(value: float) -> str:
    return f"{value:g}+0x60"


def rising(per_minute: float) -> str:
    return f"0+{per_minute:g}x60"


def once(value: float, at_minute: int) -> str:
    return f"0+0x{at_minute - 1} {value:g}+0x{60 - at_minute}"


def counter(name: str, **labels: str) -> str:
    """A series of the one process of the API that counts anything."""
    return _series(name, instance="a", **labels)


def everywhere(name: str, values: str, **labels: str) -> Series:
    """A gauge of the cluster, which both processes of the API show."""
    return {_series(name, instance=instance, **labels): values for instance in ("a", "b")}


def ended(outcome: str) -> str:
    return counter("ernie_request_total", model="m", outcome=outcome)


def retried(reason: str) -> str:
    return counter("ernie_request_retries_total", model="m", reason=reason)


def _series(name: str, **labels: str) -> str:
    return f"{name}{{{', '.join(f'{k}={chr(34)}{v}{chr(34)}' for k, v in labels.items())}}}"


FIRST = counter("ernie_time_to_first_token_seconds_count", model="m")
IN_TIME = counter("ernie_time_to_first_token_seconds_bucket", model="m", le="2.5")
OPENINGS = counter("ernie_breaker_openings_total", model="m")


def held(values: str) -> Series:
    return everywhere("ernie_held_requests", values, model="m")


def ready(role: str, values: str) -> Series:
    return everywhere("ernie_ready_replicas", values, model="m", role=role)


def needed(role: str, values: str) -> Series:
    return everywhere("ernie_needed_replicas", values, model="m", role=role)


def replicas(phase: str, values: str) -> Series:
    return everywhere("ernie_replicas", values, model="m", phase=phase, role="decode")


def blocks(state: str, values: str) -> Series:
    return everywhere("ernie_kv_blocks", values, model="m", replica="d1", state=state)


def pictures(values: str) -> Series:
    return everywhere("ernie_waiting_requests", values, model="m", replica="v1", role="vision")


def budget_used(values: str) -> Series:
    return everywhere("ernie_budget_used", values, unit="GPUs")


def began(replica: str, at_s: float) -> Series:
    """A replica, and when it began; series begin at second 0."""
    return everywhere("ernie_replica_start_time_seconds", steady(at_s), model="m", replica=replica, role="decode")


def silent(values: str) -> Series:
    return everywhere("ernie_replica_silence_seconds", values, model="m", replica="d1", role="decode")


def born(*at_s: float) -> Series:
    return {k: v for i, at in enumerate(at_s) for k, v in began(f"d{i}", at).items()}


def waited(within_1_s: str) -> Series:
    """Of 60 prompts a minute."""
    buckets = {"1.0": within_1_s, "2.5": rising(60), "+Inf": rising(60)}
    return {counter("ernie_queue_seconds_bucket", model="m", le=le): values for le, values in buckets.items()}


HEALTHY: Series = {
    **everywhere("ernie_open_promises", steady(0)),
    ended("success"): rising(60),
    **{ended(o): rising(0) for o in ("replica_error", "internal_error", "deadline_exceeded", "overloaded", "invalid")},
    FIRST: rising(60),
    IN_TIME: rising(60),
    **{retried(r): rising(0) for r in ("ReplicaLost", "EngineFailed", "TransferFailed", "PeerSilent")},
    OPENINGS: rising(0),
    **everywhere("ernie_budget", steady(8), unit="GPUs"),
    **budget_used(steady(6)),
    **{
        k: v
        for role in ("vision", "prefill", "decode")
        for k, v in (ready(role, steady(2)) | needed(role, steady(2))).items()
    },
    **replicas("ready", steady(2)),
    **replicas("starting", steady(0)),
    **born(-86_400, -86_400),
    **silent(steady(0.5)),
    **waited(rising(60)),
    **held(steady(0)),
    **blocks("used", steady(50)),
    **blocks("free", steady(50)),
    **pictures(steady(1)),
}


@dataclass(frozen=True)
class World:
    """What differs from a healthy one."""

    at: str
    """When to look."""
    bad: Series
    """The alert fires."""
    nearly: Series
    """It does not."""
    labels: Mapping[str, str] = field(default_factory=lambda: {"model": "m"})
    """Of the alert, beside its name and severity."""


DECODE = {"model": "m", "role": "decode"}

UNSCALED: Series = {k: NOTHING for role in ("vision", "prefill", "decode") for k in needed(role, "")}
"""No autoscaler says what is needed."""

WORLDS: Mapping[str, World] = {
    "ErnieErrorsBurnFast": World(
        "1h",
        {ended("replica_error"): rising(12)},
        {ended("replica_error"): "0+30x20 600+0x40"},  # a seventh of an hour's, and it is over
    ),
    "ErnieErrorsBurnSlow": World(
        "40m", {ended("internal_error"): rising(1.5)}, {ended("deadline_exceeded"): rising(0.2)}
    ),
    "ErnieFirstTokenBurnFast": World("15m", {IN_TIME: rising(12)}, {IN_TIME: rising(48)}),
    "ErnieFirstTokenBurnSlow": World("40m", {IN_TIME: rising(48)}, {IN_TIME: rising(58)}),
    "ErnieApiUnseen": World(
        "15m",
        everywhere("ernie_open_promises", NOTHING),
        {counter("ernie_open_promises"): NOTHING},
        {},
    ),
    "ErnieRouterSilent": World(
        "15m",
        everywhere("ernie_budget", NOTHING, unit="GPUs"),
        {counter("ernie_budget", unit="GPUs"): NOTHING},
        {},
    ),
    "ErnieModelUnready": World(
        "15m", {**ready("decode", steady(0)), **held(steady(3))}, ready("decode", steady(0)), DECODE
    ),
    "ErnieReplicaNotComing": World(
        "30m", replicas("starting", steady(1)), replicas("starting", "0+0x14 1+0x45"), DECODE
    ),
    "ErnieReplicaMissing": World(
        "30m",
        {**UNSCALED, **ready("decode", "2+0x10 1+0x49")},
        {**UNSCALED, **ready("decode", "2+0x25 1+0x34")},
    ),
    "ErnieReplicaSilent": World(
        "15m", silent("0+0x4 0+60x55"), silent(steady(4)), {"model": "m", "role": "decode", "replica": "d1"}
    ),
    "ErnieReplicasRestarting": World("50m", born(2400, 2500, 2600, 2700), born(0, 0, 2600, 2700), DECODE),
    "ErnieReplicasLost": World("15m", {retried("ReplicaLost"): rising(1)}, {retried("EngineFailed"): once(2, 10)}),
    "ErnieReplicasAvoided": World("15m", {OPENINGS: rising(1)}, {OPENINGS: once(1, 10)}),
    "ErnieTransfersFailing": World("15m", {retried("PeerSilent"): rising(1)}, {retried("TransferFailed"): once(2, 10)}),
    "ErnieRefusing": World("15m", {ended("overloaded"): rising(10)}, {ended("overloaded"): rising(1)}),
    "ErnieQueueLong": World("15m", held(steady(2)), held("2+0x9 0 2+0x40")),
    "ErniePromptsQueue": World("15m", waited(within_1_s=rising(40)), waited(within_1_s=rising(55))),
    "ErnieKvNearlyFull": World(
        "15m",
        {**blocks("used", steady(95)), **blocks("free", steady(5))},
        {**blocks("used", steady(85)), **blocks("free", steady(15))},
    ),
    "ErnieEncodersSaturated": World("15m", pictures(steady(10)), pictures(steady(7))),
    "ErnieBudgetExhausted": World(
        "20m", {**needed("decode", steady(2.3)), **budget_used(steady(8))}, needed("decode", steady(4)), DECODE
    ),
}
