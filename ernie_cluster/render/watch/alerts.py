"""What somebody has to be told of: each alert with its expression, how long it has to hold, and what it says.

Every process of the API shows the same gauges of the cluster, so they are taken once (`max by`); counters are of one process
each, so they are added up. `docs/runbook.md` has a section for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ernie_cluster.render.watch.objectives import (
    FAST,
    FIRST_TOKEN_S,
    OBJECTIVES,
    SLOW,
    Objective,
    Pace,
    recording_rules,
)

QUEUE_S = 1.0
"""What nine prompts in ten may wait at their engine; one of the bounds of the histogram's buckets."""
RUNBOOK = "docs/runbook.md"

Severity = Literal["page", "ticket"]
"""page: clients suffer, somebody gets up. ticket: somebody looks, by day."""


@dataclass(frozen=True, slots=True)
class Alert:
    """One alerting rule."""

    name: str
    severity: Severity
    expr: str
    """Its labels are those of the alert."""
    hold: str
    """For how long it has to be true; "" = not at all."""
    summary: str
    description: str
    """With `{{ $value }}` and labels, as Prometheus fills them in."""

    @property
    def anchor(self) -> str:
        """Of its section in the runbook."""
        return self.name.lower()

    @property
    def rule(self) -> Mapping[str, Any]:
        """As Prometheus reads it."""
        return {
            "alert": self.name,
            "expr": self.expr,
            **({"for": self.hold} if self.hold else {}),
            "labels": {"severity": self.severity},
            "annotations": {
                "summary": self.summary,
                "description": self.description,
                "runbook_url": f"{RUNBOOK}#{self.anchor}",
            },
        }


_OBJECTIVE_TEXT = {
    "Errors": ("requests that fail", "of the requests failed through a fault of ours"),
    "FirstToken": ("first tokens that come late", f"of the first tokens took longer than {FIRST_TOKEN_S:g} s"),
}


def _burn(objective: Objective, paces: Sequence[Pace], speed: str, severity: Severity) -> Alert:
    what, told = _OBJECTIVE_TEXT[objective.name]
    longs = " or ".join(pace.long for pace in paces)
    return Alert(
        f"Ernie{objective.name}Burn{speed}",
        severity,
        " or ".join(f"({objective.burns(pace)})" for pace in paces),
        "2m" if severity == "page" else "15m",
        f"{{{{ $labels.model }}}}: {what} use up the room for error {'fast' if severity == 'page' else 'too soon'}",
        f"{{{{ $value | humanizePercentage }}}} {told} within {longs}; {1 - objective.share:.1%} may.",
    )


_HELD = "max by (model) (ernie_held_requests)"
_READY = "max by (model, role) (ernie_ready_replicas)"
_NEEDED = "max by (model, role) (ernie_needed_replicas)"
_HAVE = 'sum by (model, role) (max by (model, phase, role) (ernie_replicas{phase=~"ready|switching"}))'
_REPLICA = "model, replica, role"
_ALL_READY = f"sum by (model) ({_READY})"
_BLOCKS = "max by (model, replica, state) (ernie_kv_blocks"
_RETRIES = "increase(ernie_request_retries_total"

ALERTS: tuple[Alert, ...] = (
    *(_burn(o, FAST, "Fast", "page") for o in OBJECTIVES),
    *(_burn(o, SLOW, "Slow", "ticket") for o in OBJECTIVES),
    Alert(
        "ErnieApiUnseen",
        "page",
        "absent(ernie_open_promises)",
        "2m",
        "no process of the API is seen",
        "Prometheus has read no /metrics of ours for two minutes: the API is down, or the scrape is.",
    ),
    Alert(
        "ErnieRouterSilent",
        "page",
        "count(ernie_open_promises) unless on() count(ernie_budget)",
        "1m",
        "the router does not answer",
        "{{ $value }} processes of the API are up and none has heard of the router for a minute: new requests fail.",
    ),
    Alert(
        "ErnieModelUnready",
        "page",
        f"{_READY} == 0 and on (model) {_HELD} > 0",
        "5m",
        "{{ $labels.model }} has no {{ $labels.role }} replica",
        "Requests wait for a {{ $labels.role }} replica of {{ $labels.model }}, and there has been none for five minutes.",
    ),
    Alert(
        "ErnieReplicaNotComing",
        "ticket",
        'max by (model, role) (ernie_replicas{phase="starting"}) > 0',
        "20m",
        "{{ $labels.model }}: {{ $value }} {{ $labels.role }} replicas do not start, or have fallen silent",
        "They have been starting for 20 minutes without a moment in which none was.",
    ),
    Alert(
        "ErnieReplicaMissing",
        "ticket",
        f"{_ALL_READY} < max_over_time(({_ALL_READY})[1h:1m]) unless on (model) {_NEEDED}",
        "10m",
        "{{ $labels.model }} has fewer replicas than it had",
        "{{ $value }} take work, and within the last hour there were more. (Nothing scales this model.)",
    ),
    Alert(
        "ErnieReplicaSilent",
        "ticket",
        f"max by ({_REPLICA}) (ernie_replica_silence_seconds) > 10",
        "1m",
        "{{ $labels.model }}: {{ $labels.role }} replica {{ $labels.replica }} hangs",
        "It has not told of itself for {{ $value | humanizeDuration }}; its requests go on elsewhere.",
    ),
    Alert(
        "ErnieReplicasRestarting",
        "ticket",
        f"count by (model, role) (time() - max by ({_REPLICA}) (ernie_replica_start_time_seconds) < 1800) > 3"
        " and on (model) sum by (model) (ernie_ready_replicas offset 30m) > 0",
        "",
        "{{ $labels.model }}: {{ $labels.role }} replicas end and begin again",
        "{{ $value }} of them began within the last 30 minutes.",
    ),
    Alert(
        "ErnieReplicasLost",
        "ticket",
        f'sum by (model) ({_RETRIES}{{reason=~"ReplicaLost|EngineFailed|GangBroken"}}[15m])) > 3',
        "",
        "{{ $labels.model }}: replicas are lost again and again",
        "{{ $value | humanize }} requests within 15 minutes went on elsewhere as their replica was lost.",
    ),
    Alert(
        "ErnieReplicasAvoided",
        "ticket",
        "sum by (model) (increase(ernie_breaker_openings_total[15m])) > 2",
        "",
        "{{ $labels.model }}: replicas keep failing and are left alone",
        "{{ $value | humanize }} times within 15 minutes a replica got no work for a while as it kept failing.",
    ),
    Alert(
        "ErnieTransfersFailing",
        "ticket",
        f'sum by (model) ({_RETRIES}{{reason=~"TransferFailed|PeerSilent"}}[15m])) > 3',
        "",
        "{{ $labels.model }}: hand-overs fail",
        "{{ $value | humanize }} hand-overs of KV or embeddings failed within 15 minutes; their requests went on elsewhere.",
    ),
    Alert(
        "ErnieRefusing",
        "page",
        'sum by (model) (rate(ernie_request_total{outcome="overloaded"}[5m]))'
        " / sum by (model) (rate(ernie_request_total[5m])) > 0.05",
        "10m",
        "{{ $labels.model }} refuses requests",
        "{{ $value | humanizePercentage }} of the requests have been refused for want of room, for ten minutes.",
    ),
    Alert(
        "ErnieQueueLong",
        "ticket",
        f"{_HELD} > 0",
        "10m",
        "{{ $labels.model }}: requests wait for a place",
        "{{ $value }} requests wait at the router, and there has been no moment without for ten minutes.",
    ),
    Alert(
        "ErniePromptsQueue",
        "ticket",
        f"histogram_quantile(0.9, sum by (le, model) (rate(ernie_queue_seconds_bucket[5m]))) > {QUEUE_S}",
        "10m",
        "{{ $labels.model }}: prompts wait at their engines",
        f"One prompt in ten waits longer than {{{{ $value | humanizeDuration }}}} for its first step; {QUEUE_S:g} s is the target.",
    ),
    Alert(
        "ErnieKvNearlyFull",
        "ticket",
        f'sum by (model) ({_BLOCKS}{{state="used"}})) / sum by (model) ({_BLOCKS})) > 0.9',
        "10m",
        "{{ $labels.model }}: the KV cache is nearly full",
        "{{ $value | humanizePercentage }} of the KV blocks of all its replicas are in use or promised.",
    ),
    Alert(
        "ErnieEncodersSaturated",
        "ticket",
        'sum by (model) (max by (model, replica, role) (ernie_waiting_requests{role="vision"}))'
        ' / (sum by (model) (max by (model, role) (ernie_ready_replicas{role="vision"})) > 0) > 4',
        "10m",
        "{{ $labels.model }}: pictures pile up before the encoders",
        "{{ $value | humanize }} pictures or videos per vision replica have been waiting for ten minutes.",
    ),
    Alert(
        "ErnieBudgetExhausted",
        "ticket",
        f"{_NEEDED} > {_HAVE} and on() (max(ernie_budget_used) >= max(ernie_budget))",
        "15m",
        "{{ $labels.model }} needs more {{ $labels.role }} replicas than the budget allows",
        "It needs {{ $value | humanize }} of them, and all GPUs (or cores) of the budget are held.",
    ),
)


def rule_groups() -> list[Mapping[str, Any]]:
    """What a rule file and a PrometheusRule have in common."""
    return [
        {"name": "ernie-objectives", "rules": recording_rules()},
        {"name": "ernie-alerts", "rules": [alert.rule for alert in ALERTS]},
    ]
