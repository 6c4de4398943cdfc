"""Counters at 0 from the start: a rate does not see the first event of a series that begins with it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

from ernie_cluster.api.status import INTERNAL, TABLE
from ernie_cluster.api.traffic import UNKNOWN_MODEL
from ernie_cluster.errors import (
    EngineFailed,
    Evicted,
    GangBroken,
    PeerSilent,
    ReplicaError,
    ReplicaLost,
    TransferFailed,
)
from ernie_cluster.observe.metrics import Metrics

_OUTCOMES = tuple(dict.fromkeys(("success", INTERNAL.outcome, *(status.outcome for _, status in TABLE))))
_ACTIONS = (
    *("switch_role", "move_gpus", "scale_out", "scale_in", "scale_to_zero", "wake_up", "note"),
    *("drain", "undrain", "restart", "role"),
)
_FAILURES = tuple(
    kind.__name__ for kind in (ReplicaLost, EngineFailed, GangBroken, TransferFailed, PeerSilent, Evicted, ReplicaError)
)
_BROKEN = tuple(kind.__name__ for kind in (TransferFailed, PeerSilent))
_FETCHES = ("fetched", "late", "declined", "refused", "incomplete")


def begin_at_zero(metrics: Metrics, models: Iterable[str]) -> None:
    """Show every counter whose labels are known before anything happens."""
    for name, labels in _series(tuple(models)).items():
        for values in itertools.product(*labels.values()):
            metrics.inc(name, 0, **dict(zip(labels, values, strict=True)))


def _series(models: Sequence[str]) -> Mapping[str, Mapping[str, Sequence[str]]]:
    """By counter and label: the values that it can have."""
    named = {"model": models}
    return {
        "ernie_request_total": {"model": (*models, UNKNOWN_MODEL), "outcome": _OUTCOMES},
        "ernie_request_refused_total": {"model": (UNKNOWN_MODEL,), "reason": ("unauthorized", "rate_limited")},
        "ernie_request_retries_total": {"model": models, "reason": _FAILURES},
        "ernie_transfer_failures_total": {"model": models, "reason": _BROKEN},
        "ernie_resumes_total": {"model": models, "why": ("drained",)},
        "ernie_prompt_tokens_total": named,
        "ernie_cached_prompt_tokens_total": named,
        "ernie_generation_tokens_total": named,
        "ernie_prefix_fetches_total": {"model": models, "outcome": _FETCHES},
        "ernie_fetched_blocks_total": named,
        "ernie_transfer_bytes_total": {"kind": ("kv", "embeddings")},
        "ernie_breaker_openings_total": named,
        "ernie_encode_hedges_total": named,
        "ernie_scaling_actions_total": {"action": _ACTIONS, "model": models},
    }
