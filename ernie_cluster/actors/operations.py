"""What the router tells operators, and does at their word."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from statistics import fmean, median

from ernie_cluster.actors.roster import Roster
from ernie_cluster.actors.scaler import Scaler
from ernie_cluster.api.backend import ModelStatus
from ernie_cluster.api.operator import ClusterView, DecisionView, ModelView, Order, ReplicaView
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.pool import can_serve
from ernie_cluster.errors import OrderRefused, UnknownReplica
from ernie_cluster.policy.books import Books
from ernie_cluster.policy.scaling.plan import Gang
from ernie_cluster.policy.scaling.snapshot import ReplicaState

log = logging.getLogger(__name__)

_PARTING_S = 10.0
"""What a replica that is to end gets to part with its last requests."""
_MAX_SHOWN = 20
"""Decisions in an overview."""


class Operations:
    """See the module; the router's half of `api.operator.Operations`."""

    def __init__(self, config: ClusterConfig, books: Books, roster: Roster, scaler: Scaler) -> None:
        self._config, self._books, self._roster, self._scaler = config, books, roster, scaler

    def cluster(self, status: Sequence[ModelStatus], now_s: float) -> ClusterView:
        """How things are; `status` of every model."""
        replicas = [self._replica(gang, now_s) for gang in self._roster.gangs()]
        replicas += [
            ReplicaView(_name(model, r), model, r.role, r.role, "starting", "", r.gpus)
            for model, r in self._scaler.coming()
        ]
        replicas.sort(key=lambda r: (r.model, r.home, r.replica))
        return ClusterView(
            models=tuple(map(self._model, status)),
            replicas=tuple(replicas),
            is_autoscaled=self._config.scaling is not None,
            budget=self._config.budget,
            used=sum(r.gpus for r in replicas),
            budget_unit=self._config.budget_unit,
            decisions=tuple(self.decisions()[:_MAX_SHOWN]),
            num_promises=self._books.num_promises,
        )

    def decisions(self) -> list[DecisionView]:
        """Newest first."""
        return list(self._scaler.log)

    async def order(self, order: Order, now_s: float) -> ReplicaView:
        """See `api.operator.Operations.order`."""
        gang = self._find(order.replica)
        within_s = self._config.router.drain_timeout_s if order.within_s is None else order.within_s
        match order.action:
            case "drain":
                await self._roster.tell(gang.gang_id, is_draining=True, within_s=within_s)
            case "restart":
                await self._roster.tell(gang.gang_id, is_draining=True, within_s=within_s)
                self._scaler.restart(gang, now_s + within_s + _PARTING_S)
            case "undrain":
                self._scaler.keep(gang)
                await self._roster.tell(gang.gang_id, is_draining=False)
            case "role":
                self._check_role(gang, order)
                await self._roster.tell(gang.gang_id, role=order.role)
                self._scaler.switched(gang, now_s)
        detail = order.action if order.role is None else f"{gang.role} -> {order.role}"
        entry = DecisionView(time.time(), gang.model, order.action, (gang.gang_id,), detail, "an operator's order")
        self._scaler.log.appendleft(entry)
        log.info("an operator's order: %s %s", gang.gang_id, detail)
        return self._replica(self._find(gang.gang_id), now_s)

    def _find(self, replica_id: str) -> Gang:
        gangs = self._roster.gangs()
        gang = next((g for g in gangs if g.gang_id == replica_id), None)
        if gang is None:
            known = ", ".join(g.gang_id for g in gangs) or "none"
            raise UnknownReplica(f"there is no replica {replica_id!r}; known: {known}")
        return gang

    def _check_role(self, gang: Gang, order: Order) -> None:
        deployment = self._config.model(gang.model)
        if order.role is None:
            raise OrderRefused("role is missing; name one of prefill, decode and mixed", "role")
        if deployment.pool(order.role) is None and order.role != "mixed" and gang.home != "mixed":
            raise OrderRefused(f"model {gang.model!r} has no pool {order.role}", "role")
        others = {
            g.role
            for g in self._roster.gangs()
            if g.model == gang.model and g.gang_id != gang.gang_id and not g.is_draining
        }
        roles = others | {order.role}
        if gang.home != "vision" and not can_serve(roles):
            raise OrderRefused(
                f"{gang.gang_id} is the last that does {gang.role} for {gang.model!r}; give another one that role first",
                "role",
            )

    def _replica(self, gang: Gang, now_s: float) -> ReplicaView:
        lanes = self._roster.loads(gang.gang_id)
        loads = [load for _, load in lanes]
        ids = {info.replica_id for info, _ in lanes}
        ages = [s.age_s for s in self._books.view(now_s) if s.replica_id in ids]
        phase = self._scaler.phase(gang)
        return ReplicaView(
            replica=gang.gang_id,
            model=gang.model,
            home=gang.home,
            role=gang.role,
            phase="starting" if phase == "planned" or phase == "silent" else phase,
            node=lanes[0][0].node_id if lanes else "",
            gpus=self._scaler.gpus[gang.pool],
            num_running=sum(load.num_running for load in loads),
            num_waiting=sum(load.num_waiting for load in loads),
            num_leases=sum(load.num_leases for load in loads),
            waiting_tokens=sum(load.waiting_tokens for load in loads),
            free_blocks=sum(load.free_blocks for load in loads),
            total_blocks=sum(load.total_blocks for load in loads),
            age_s=max(ages, default=0.0),
            started_s=lanes[0][0].started_s if lanes else 0.0,
        )

    def _model(self, status: ModelStatus) -> ModelView:
        looks = [m for look in self._scaler.looks for m in look.models if m.name == status.name]
        needs = dict(self._scaler.decision.needs).get(status.name) if self._scaler.decision else None
        named = {} if needs is None else {"prefill": needs.prefill, "decode": needs.decode, "vision": needs.vision}
        known = {role: need for role, need in named.items() if need is not None}
        return ModelView(
            name=status.name,
            is_ready=status.is_ready,
            detail=status.detail,
            num_held=looks[-1].num_held if looks else 0,
            requests_per_s=_mean([m.prefill.requests_per_s for m in looks]),
            prompt_tokens_per_s=_mean([m.prefill.tokens_per_s for m in looks]),
            output_tokens_per_s=_mean([m.decode.tokens_per_s for m in looks]),
            ttft_p90_s=_middle([m.prefill.latency_p90_s for m in looks]),
            tpot_p90_s=_middle([m.decode.latency_p90_s for m in looks]),
            needs=known or None,
        )


def _name(model: str, replica: ReplicaState) -> str:
    """Of one that has not registered; until it runs it has no id that would differ from those of other models."""
    return replica.replica_id if replica.phase == "silent" else f"{model}/{replica.replica_id}"


def _mean(values: list[float]) -> float:
    return fmean(values) if values else 0.0


def _middle(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return median(known) if known else None
