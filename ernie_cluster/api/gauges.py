"""What the replicas behind the API have to do, as gauges on `/metrics`; asked for when somebody looks."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

from ernie_cluster.api.backend import Backend, ReplicaLoad
from ernie_cluster.api.cluster_gauges import ClusterGauges
from ernie_cluster.config.experts import ExpertUse
from ernie_cluster.errors import ErnieClusterError
from ernie_cluster.observe.metrics import Metrics

T = TypeVar("T")

_log = logging.getLogger(__name__)

MAX_AGE_S = 1.0
"""Looking more often than this shows the same again."""
TIMEOUT_S = 2.0
"""A backend that does not tell within this is shown without its replicas."""


class ReplicaGauges:
    """Asks a backend for its replicas' loads and for an operator's view of them, once for all who look at the same time.

    Args:
        backend: is asked.
        metrics: shows what it says; of a replica that is gone nothing is left.
        clock: monotonic seconds.
    """

    def __init__(self, backend: Backend, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._backend, self._metrics, self._clock = backend, metrics, clock
        self._cluster = ClusterGauges(metrics)
        self._lock = asyncio.Lock()
        self._asked_s = float("-inf")
        self._pools: set[tuple[str, str]] = set()
        """(model, role) of all replicas that there ever were: a pool that has lost its last one shows 0."""

    async def refresh(self) -> None:
        """Bring the gauges up to date; takes twice `TIMEOUT_S` at most, and double that behind another one."""
        async with self._lock:
            if self._clock() - self._asked_s < MAX_AGE_S:
                return
            loads, view = await asyncio.gather(_told(self._backend.loads), _told(self._backend.cluster))
            news = await _told(self._backend.decisions) if self._cluster.has_news(view) else None
            self._asked_s = self._clock()
            self._show(loads or [])
            self._cluster.show(view, news or [])

    def _show(self, loads: Sequence[ReplicaLoad]) -> None:
        show, ready = self._metrics.replace, Counter((load.model, load.role) for load in loads)
        self._pools |= ready.keys()
        show("ernie_ready_replicas", {pool: ready[pool] for pool in self._pools})
        by_replica = {(load.model, load.replica, load.role): load for load in loads}
        show("ernie_running_requests", {key: load.num_running for key, load in by_replica.items()})
        show("ernie_waiting_requests", {key: load.num_waiting for key, load in by_replica.items()})
        show("ernie_waiting_tokens", {key: load.waiting_tokens for key, load in by_replica.items()})
        blocks: dict[tuple[str, ...], float] = {
            (load.model, load.replica, state): count
            for load in loads
            if load.total_blocks
            for state, count in (("used", load.total_blocks - load.free_blocks), ("free", load.free_blocks))
        }
        show("ernie_kv_blocks", blocks)
        self._show_experts({key: load.experts for key, load in by_replica.items() if load.experts is not None})

    def _show_experts(self, uses: Mapping[tuple[str, ...], ExpertUse]) -> None:
        show = self._metrics.replace
        show("ernie_expert_imbalance", {key: use.imbalance for key, use in uses.items()})
        show("ernie_hottest_expert_share", {key: use.hottest_share for key, use in uses.items()})
        show("ernie_expert_moves", {key: use.num_moves for key, use in uses.items()})
        routed = {
            (modality, *key): tokens
            for key, use in uses.items()
            for modality, tokens in zip(("text", "vision"), use.routed_tokens, strict=False)
        }
        show("ernie_routed_tokens", routed)


async def _told(ask: Callable[[], Awaitable[T]]) -> T | None:
    """What a backend answers; None where it cannot, or not in time."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return await ask()
    except (TimeoutError, ErnieClusterError) as e:
        _log.warning("not on /metrics: %s", e or f"the backend did not answer within {TIMEOUT_S:g} s")
        return None
