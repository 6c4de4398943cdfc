"""The dashboard of what replicas do, by model and role."""

from __future__ import annotations

from ernie_cluster.render.watch.panels import Board, Panel, Query, Row
from ernie_cluster.render.watch.promql import RATE, at_work, once, per_s, quantile, series, share, total

POOL = "model, role"
OF_REPLICA = "model, replica, role"
_LEGEND = "{{model}} {{role}}"
_WORK = "vision counts pictures and videos, the others sequences"


def _by_pool(gauge: str) -> tuple[Query, ...]:
    return (Query(total(gauge, OF_REPLICA, POOL), _LEGEND),)


def _stages(histogram: str, by: str, legend: str) -> tuple[Query, ...]:
    return tuple(Query(quantile(q, histogram, by), f"p{q * 100:g} {legend}") for q in (0.5, 0.99))


_BLOCKS = "model, replica, state"
_KV_USED = share(
    total("ernie_kv_blocks", _BLOCKS, "model, replica", 'state="used"'),
    total("ernie_kv_blocks", _BLOCKS, "model, replica"),
)

_REPLICAS = (
    Panel(
        "Replicas by phase",
        "starting: takes no work yet. switching: takes that of its new role and finishes that of its old one. "
        "draining: finishes what it has.",
        "short",
        (Query(total("ernie_replicas", "model, phase, role", "model, phase, role"), "{{model}} {{role}} {{phase}}"),),
        is_stacked=True,
    ),
    Panel(
        "Ready and needed",
        "Replicas that take new work, and how many the autoscaler finds needed.",
        "short",
        (
            Query(at_work(), f"{_LEGEND} ready"),
            Query(f"{total('ernie_needed_replicas', POOL, POOL)} or on() vector(0)", f"{_LEGEND} needed"),
        ),
    ),
    Panel(
        "GPUs held",
        "GPUs, or cores where no pool has any, that the replicas of each role hold.",
        "short",
        (Query(total("ernie_replica_gpus", POOL, POOL), _LEGEND),),
        is_stacked=True,
    ),
)

_LOAD = (
    Panel("Running", f"What takes part in steps; {_WORK}.", "short", _by_pool("ernie_running_requests")),
    Panel("Waiting", f"What waits for its turn at a replica; {_WORK}.", "short", _by_pool("ernie_waiting_requests")),
    Panel(
        "Waiting tokens",
        "Prompt tokens, of vision media tokens, that wait; `router.max_queued_tokens` of one replica are the most.",
        "short",
        _by_pool("ernie_waiting_tokens"),
    ),
    Panel(
        "Queue of prompts",
        "What a prompt waits at its engine until its first step.",
        "s",
        _stages("ernie_queue_seconds", "model", "{{model}}"),
    ),
    Panel(
        "KV in use",
        "Part of the KV blocks that answers and leases hold. Cached blocks count as free: they are given up when needed.",
        "percentunit",
        (Query(_KV_USED, "{{model}} {{replica}}"),),
    ),
)

_CACHES = (
    Panel(
        "Prompt tokens found in caches",
        "Part of the prompt tokens that no replica had to compute.",
        "percentunit",
        (
            Query(
                share(per_s("ernie_cached_prompt_tokens_total", "model"), per_s("ernie_prompt_tokens_total", "model")),
                "{{model}}",
            ),
        ),
    ),
    Panel(
        "Prefixes fetched from other replicas",
        "Prompts that waited for a prefix from another replica, by how it came.",
        "cps",
        (Query(per_s("ernie_prefix_fetches_total", "outcome"), "{{outcome}}"),),
    ),
    Panel(
        "KV blocks fetched",
        "KV blocks that came from other replicas' prefix caches.",
        "cps",
        (Query(per_s("ernie_fetched_blocks_total", "model"), "{{model}}"),),
    ),
)

_HAND_OVERS = (
    Panel(
        "Bytes handed over",
        "Between replicas: KV from prefill to decode, embeddings from vision to prefill.",
        "Bps",
        (Query(f"sum by (kind) (rate(ernie_transfer_bytes_total[{RATE}]))", "{{kind}}"),),
    ),
    Panel(
        "Time of a hand-over",
        "From its first piece to its last: KV goes layer by layer while the prompt is computed, so this is no time lost.",
        "s",
        tuple(
            Query(
                f"histogram_quantile({q}, sum by (le, kind) (rate(ernie_transfer_seconds_bucket[{RATE}])))",
                f"p{q * 100:g} {{{{kind}}}}",
            )
            for q in (0.5, 0.99)
        ),
    ),
)

_VISION = 'role="vision"'
_ENCODING = (
    Panel(
        "Encoding",
        "One picture or video that no cache had.",
        "s",
        _stages("ernie_encode_seconds", "model", "{{model}}"),
    ),
    Panel(
        "Pictures waiting per encoder",
        "Waiting at vision replicas, over the number of those that take work.",
        "short",
        (
            Query(
                share(
                    total("ernie_waiting_requests", OF_REPLICA, "model", _VISION),
                    f"({total('ernie_ready_replicas', POOL, 'model', _VISION)} > 0)",
                ),
                "{{model}}",
            ),
        ),
    ),
    Panel(
        "Pictures asked of a second encoder",
        "As the first one was late (`router.hedge_encode`) or failed.",
        "cps",
        (Query(per_s("ernie_encode_hedges_total", "model"), "{{model}}"),),
    ),
)

_ROUTING = (
    Panel(
        "Routing", "Admission and routing of one request.", "s", _stages("ernie_route_seconds", "model", "{{model}}")
    ),
    Panel(
        "What spoke for the chosen",
        "Replicas chosen for a stage, by why.",
        "cps",
        (Query(per_s("ernie_route_choices_total", "stage, why"), "{{stage}}: {{why}}"),),
        is_stacked=True,
    ),
)

_EXPERTS = (
    Panel(
        "Imbalance of experts",
        "Load of the rank with most to do over the mean; 1 = even.",
        "none",
        (Query(once(series("ernie_expert_imbalance"), OF_REPLICA), "{{model}} {{replica}}"),),
    ),
    Panel(
        "Hottest expert",
        "Largest part of a layer's tokens of one modality that one expert got.",
        "percentunit",
        (Query(once(series("ernie_hottest_expert_share"), OF_REPLICA), "{{model}} {{replica}}"),),
    ),
    Panel(
        "Tokens routed to experts",
        "Per second, by modality.",
        "cps",
        (
            Query(
                "sum by (model, modality) (max by (model, modality, replica) "
                f"(rate({series('ernie_routed_tokens')}[$__rate_interval])))",
                "{{model}} {{modality}}",
            ),
        ),
    ),
)

POOLS = Board(
    "ernie-pools",
    "ERNIE / Pools",
    "What the replicas of each model and role do, and what goes between them.",
    (
        Row("Replicas", _REPLICAS),
        Row("Load", _LOAD),
        Row("Caches", _CACHES),
        Row("Hand-overs", _HAND_OVERS),
        Row("Pictures", _ENCODING),
        Row("Routing", _ROUTING),
        Row("Experts", _EXPERTS),
    ),
    models_of="ernie_ready_replicas",
)
