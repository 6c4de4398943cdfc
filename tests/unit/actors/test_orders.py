"""The router's view of its replicas, and orders, without replicas."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from ernie_cluster.actors.messages import Load
from ernie_cluster.actors.operations import Operations
from ernie_cluster.api.backend import ModelStatus
from ernie_cluster.api.operator import DecisionView, Order
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.deployment import ModelDeployment
from ernie_cluster.config.pool import PoolConfig
from ernie_cluster.errors import OrderRefused, UnknownReplica
from ernie_cluster.policy.books import Books
from ernie_cluster.policy.scaling.plan import Gang
from ernie_cluster.policy.scaling.snapshot import ModelState, ReplicaState, ScalingSnapshot, StageStats

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", ["asyncio"])]

POOLS = tuple(PoolConfig(role, num_cpus=2.0) for role in ("vision", "prefill", "decode"))
CONFIG = ClusterConfig((ModelDeployment("m", "/m", POOLS, switch_roles=True),))
GANGS = [Gang(f"m/{role}/{i}", "m", role, role) for role in ("prefill", "decode") for i in range(2)]
ALONE = [GANGS[0], GANGS[2]]
EYES = Gang("m/vision/0", "m", "vision", "vision")
READY = [ModelStatus("m", True, "")]


class Fleet:
    """Stands in for roster and scaler; what gangs are told is so at once."""

    def __init__(self, gangs: list[Gang]) -> None:
        self._gangs = {g.gang_id: g for g in gangs}
        self.log = deque[DecisionView]()
        self.gpus = {("m", p.role): 2.0 for p in POOLS}
        self.decision = None
        self.within = list[float | None]()
        self.restarted = list[tuple[str, float]]()
        self.kept, self.changed = list[str](), list[str]()
        state = ModelState("m", (), prefill=StageStats(2.0, 100.0, latency_p90_s=0.5), decode=StageStats(2.0, 30.0))
        slow = replace(state, prefill=StageStats(4.0, 300.0, latency_p90_s=1.5))
        self.looks = [ScalingSnapshot((state,)), ScalingSnapshot((slow,))]

    def gangs(self) -> list[Gang]:
        return sorted(self._gangs.values(), key=lambda g: g.gang_id)

    def loads(self, gang_id: str) -> list[tuple[Any, Load]]:
        lanes = [SimpleNamespace(replica_id=f"{gang_id}/{i}", node_id="node", started_s=7.0) for i in range(2)]
        return [(lane, Load(1, 2, 30, free_blocks=4, total_blocks=10)) for lane in lanes]

    async def tell(self, gang_id: str, *, within_s: float | None = None, **wishes: Any) -> None:
        self.within.append(within_s)
        self._gangs[gang_id] = replace(self._gangs[gang_id], **wishes)

    def coming(self) -> list[tuple[str, ReplicaState]]:
        return [("m", ReplicaState("starting/0/decode", "decode", 2.0, "starting"))]

    def phase(self, gang: Gang) -> str:
        return "draining" if gang.is_draining else "ready"

    def restart(self, gang: Gang, until_s: float) -> None:
        self.restarted.append((gang.gang_id, until_s))

    def keep(self, gang: Gang) -> None:
        self.kept.append(gang.gang_id)

    def switched(self, gang: Gang, now_s: float) -> None:
        self.changed.append(gang.gang_id)


def operations(gangs: list[Gang]) -> tuple[Operations, Fleet]:
    fleet = Fleet(gangs)
    return Operations(CONFIG, Books(5.0), fleet, fleet), fleet  # type: ignore[arg-type]


async def test_the_view_shows_gangs_as_one_and_what_is_to_come() -> None:
    desk, _ = operations([*GANGS, EYES])
    view = desk.cluster(READY, 0.0)
    assert (view.used, view.budget, view.budget_unit, view.is_autoscaled) == (12.0, 6.0, "cores", False)
    assert [r.replica for r in view.replicas if r.phase == "starting"] == ["m/starting/0/decode"]
    one = next(r for r in view.replicas if r.replica == "m/decode/0")
    assert (one.num_running, one.num_waiting, one.waiting_tokens, one.free_blocks, one.total_blocks) == (
        2,
        4,
        60,
        8,
        20,
    )
    (model,) = view.models
    assert (model.requests_per_s, model.prompt_tokens_per_s, model.output_tokens_per_s) == (3.0, 200.0, 30.0)
    assert (model.ttft_p90_s, model.tpot_p90_s, model.needs) == (1.0, None, None)


async def test_orders_are_told_and_logged() -> None:
    desk, fleet = operations(GANGS)
    assert (await desk.order(Order("m/decode/0", "drain"), 0.0)).phase == "draining"
    assert (await desk.order(Order("m/decode/0", "undrain"), 0.0)).phase == "ready"
    assert (await desk.order(Order("m/decode/1", "role", "prefill"), 0.0)).role == "prefill"
    await desk.order(Order("m/prefill/0", "drain", within_s=3.0), 0.0)
    assert fleet.within == [CONFIG.router.drain_timeout_s, None, None, 3.0]
    assert (fleet.kept, fleet.changed) == (["m/decode/0"], ["m/decode/1"])
    entries = [(d.action, d.replicas, d.detail) for d in desk.decisions()]
    assert entries == [
        ("drain", ("m/prefill/0",), "drain"),
        ("role", ("m/decode/1",), "decode -> prefill"),
        ("undrain", ("m/decode/0",), "undrain"),
        ("drain", ("m/decode/0",), "drain"),
    ]


@pytest.mark.parametrize(
    ("gangs", "order", "words"),
    [
        (ALONE, Order("m/decode/0", "role", "prefill"), "the last that does decode"),
        (ALONE, Order("m/prefill/0", "role", "decode"), "the last that does prefill"),
        (ALONE, Order("m/prefill/0", "role"), "role is missing"),
        ([*ALONE, replace(GANGS[3], is_draining=True)], Order("m/decode/0", "role", "prefill"), "the last"),
    ],
)
async def test_a_model_is_never_left_without_a_way(gangs: list[Gang], order: Order, words: str) -> None:
    desk, fleet = operations(gangs)
    with pytest.raises(OrderRefused, match=words):
        await desk.order(order, 0.0)
    assert fleet.gangs() == sorted(gangs, key=lambda g: g.gang_id)
    assert not fleet.log


async def test_who_is_not_there_is_answered_with_who_is() -> None:
    desk, _ = operations(ALONE)
    with pytest.raises(UnknownReplica, match="known: m/decode/0, m/prefill/0"):
        await desk.order(Order("m/decode/9", "drain"), 0.0)


async def test_a_restart_is_a_drain_with_an_end() -> None:
    desk, fleet = operations(GANGS)
    assert (await desk.order(Order("m/decode/0", "restart", within_s=5.0), 100.0)).phase == "draining"
    ((gang_id, until_s),) = fleet.restarted
    assert (gang_id, fleet.within) == ("m/decode/0", [5.0])
    assert until_s > 105.0, "what is left has time to move"
