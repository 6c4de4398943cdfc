"""The dashboard of what went wrong, how it was made good, and what the autoscaler did."""

from __future__ import annotations

from ernie_cluster.render.watch.panels import Board, Panel, Query, Row
from ernie_cluster.render.watch.pools_board import OF_REPLICA, POOL
from ernie_cluster.render.watch.promql import at_work, once, per_s, series, total

_RECOVERY = (
    Panel(
        "Moves",
        "Requests that went on elsewhere from the tokens that their client had, as their replica was leaving. No failures.",
        "cps",
        (Query(per_s("ernie_resumes_total", "model, why"), "{{model}} {{why}}"),),
    ),
    Panel(
        "Retries by reason",
        "Requests that went on elsewhere after a failure that their client did not see.",
        "cps",
        (Query(per_s("ernie_request_retries_total", "reason"), "{{reason}}"),),
        is_stacked=True,
    ),
    Panel(
        "Breakers that opened",
        "Replicas that got no work for a while as they kept failing (`router.breaker_failures`).",
        "cps",
        (Query(per_s("ernie_breaker_openings_total", "model"), "{{model}}"),),
    ),
)

_LIVES = (
    Panel(
        "Replicas that began in the last 15 minutes",
        "More than deployments and the autoscaler explain are replicas that end and begin again.",
        "short",
        (
            Query(
                f"count by (model, role) (time() - {once(series('ernie_replica_start_time_seconds'), OF_REPLICA)} < 900)"
                " or on() vector(0)",
                "{{model}} {{role}}",
            ),
        ),
        is_stacked=True,
    ),
    Panel(
        "Silent replicas",
        "How long a replica has not told of itself. Past `router.heartbeat_timeout_s` it is taken to hang, and its requests "
        "go on elsewhere.",
        "s",
        (Query(once(series("ernie_replica_silence_seconds"), OF_REPLICA), "{{model}} {{role}} {{replica}}"),),
    ),
    Panel(
        "Not ready",
        "Replicas that start, change roles or drain.",
        "short",
        (
            Query(
                total("ernie_replicas", "model, phase, role", "model, phase", 'phase!="ready"'),
                "{{model}} {{phase}}",
            ),
        ),
        is_stacked=True,
    ),
    Panel(
        "Processes of the API, and those whose router answers",
        "Where the second is less, `/metrics` has nothing of the cluster: the router is gone, or cannot be reached.",
        "short",
        (
            Query("count(ernie_open_promises)", "processes"),
            Query("count(max by (instance) (ernie_budget)) or on() vector(0)", "router answers"),
        ),
    ),
)

_SCALING = (
    Panel(
        "Decisions",
        "What the autoscaler and operators did, per minute.",
        "short",
        (
            Query(
                f"max by (model, action) (rate({series('ernie_scaling_actions_total')}[$__rate_interval])) * 60",
                "{{model}} {{action}}",
            ),
        ),
        is_stacked=True,
    ),
    Panel(
        "Budget",
        "GPUs, or cores where no pool has any, that all replicas together hold, and the most they may.",
        "short",
        (
            Query(once("ernie_budget_used", "unit"), "{{unit}} held"),
            Query(once("ernie_budget", "unit"), "{{unit}} budget"),
        ),
    ),
    Panel(
        "Missing replicas",
        "Needed by the autoscaler's last look, and not there yet.",
        "short",
        (
            Query(
                f"clamp_min({total('ernie_needed_replicas', POOL, POOL)} - {at_work()}, 0) or on() vector(0)",
                "{{model}} {{role}}",
            ),
        ),
    ),
)

RECOVERY = Board(
    "ernie-recovery",
    "ERNIE / Recovery and scaling",
    "What failed and went on elsewhere, who comes and goes, and what the autoscaler decided.",
    (Row("Recovery", _RECOVERY), Row("Lives", _LIVES), Row("Scaling", _SCALING)),
    models_of="ernie_ready_replicas",
)
