"""Whether everything that was lent has come back: KV blocks, leases, promises, requests, replicas. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ernie_cluster.api.operator import ClusterView


@dataclass(frozen=True, slots=True)
class Held:
    """What a system holds at one moment."""

    replicas: Mapping[str, int]
    """Ready ones, by the role that they were started with."""
    lent: Mapping[str, int]
    """KV blocks, leases, promises, and requests of all kinds."""

    def objection(self, calm: Held) -> str:
        """What is there beyond the calm count, or missing; "" if nothing is."""
        more = [
            f"{now} {what} (calm: {calm.lent.get(what, 0)})"
            for what, now in self.lent.items()
            if now > calm.lent.get(what, 0)
        ]
        fewer = [
            f"{self.replicas.get(pool, 0)} of {wanted} replicas of {pool}"
            for pool, wanted in calm.replicas.items()
            if self.replicas.get(pool, 0) < wanted
        ]
        return "; ".join(more + fewer)


def held(view: ClusterView, model: str) -> Held:
    """Of a model in an overview; others may come and go. A prefix cache's blocks count as free, as what it holds it gives
    back when asked."""
    own = [r for r in view.replicas if r.model == model]
    lent = {
        "KV blocks": sum(r.total_blocks - r.free_blocks for r in own),
        "leases": sum(r.num_leases for r in own),
        "running requests": sum(r.num_running for r in own),
        "waiting requests": sum(r.num_waiting for r in own),
        "tokens to compute": sum(r.waiting_tokens for r in own),
        "promises": view.num_promises,
        "held requests": sum(m.num_held for m in view.models if m.name == model),
    }
    return Held(Counter(r.home for r in own if r.phase == "ready"), lent)
