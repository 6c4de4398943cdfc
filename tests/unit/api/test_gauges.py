"""Loads of replicas on `/metrics`: as the backend tells them, and without those that it does not tell of."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from ernie_cluster.api import gauges
from ernie_cluster.api.backend import ReplicaLoad
from ernie_cluster.api.gauges import ReplicaGauges
from ernie_cluster.api.operator import ClusterView, DecisionView
from ernie_cluster.config.experts import ExpertUse
from ernie_cluster.errors import ReplicaLost
from ernie_cluster.observe.metrics import InMemoryMetrics
from tests.fakes import FakeBackend
from tests.unit.api.client import Server
from tests.unit.api.clusters import DECISIONS, PREFILL, VIEW

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

VISION = ReplicaLoad("m", "vision", "m/vision/1", 1, 2, 30, 0, 0)
DECODE = ReplicaLoad("m", "decode", "m/decode/1", 4, 0, 0, 60, 100)
MIXED = ReplicaLoad("e", "mixed", "e/mixed/1", 0, 0, 0, 9, 9, ExpertUse(1.5, 0.25, (70, 30), 2))


def shown(metrics: InMemoryMetrics) -> dict[str, float]:
    lines = metrics.render().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


class Watch:
    """Gauges over a fake backend, and a clock."""

    def __init__(self, *loads: ReplicaLoad) -> None:
        self.now_s = 0.0
        self.backend, self.metrics = FakeBackend(), InMemoryMetrics()
        self.backend.load_news = list(loads)
        self.gauges = ReplicaGauges(self.backend, self.metrics, lambda: self.now_s)

    async def look(self, later_s: float = gauges.MAX_AGE_S) -> dict[str, float]:
        self.now_s += later_s
        await self.gauges.refresh()
        return shown(self.metrics)


async def test_all_that_replicas_tell_is_shown() -> None:
    assert await Watch(VISION, DECODE).look() == {
        'ernie_ready_replicas{model="m",role="vision"}': 1,
        'ernie_ready_replicas{model="m",role="decode"}': 1,
        'ernie_running_requests{model="m",replica="m/vision/1",role="vision"}': 1,
        'ernie_running_requests{model="m",replica="m/decode/1",role="decode"}': 4,
        'ernie_waiting_requests{model="m",replica="m/vision/1",role="vision"}': 2,
        'ernie_waiting_requests{model="m",replica="m/decode/1",role="decode"}': 0,
        'ernie_waiting_tokens{model="m",replica="m/vision/1",role="vision"}': 30,
        'ernie_waiting_tokens{model="m",replica="m/decode/1",role="decode"}': 0,
        'ernie_kv_blocks{model="m",replica="m/decode/1",state="used"}': 40,
        'ernie_kv_blocks{model="m",replica="m/decode/1",state="free"}': 60,
        'ernie_budget{unit="GPUs"}': 0,
        'ernie_budget_used{unit="GPUs"}': 0,
        "ernie_open_promises": 0,
    }


async def test_the_use_of_experts_is_shown_where_there_are_some() -> None:
    watch = Watch(MIXED, DECODE)
    assert {key: value for key, value in (await watch.look()).items() if "expert" in key or "routed" in key} == {
        'ernie_expert_imbalance{model="e",replica="e/mixed/1",role="mixed"}': 1.5,
        'ernie_hottest_expert_share{model="e",replica="e/mixed/1",role="mixed"}': 0.25,
        'ernie_expert_moves{model="e",replica="e/mixed/1",role="mixed"}': 2,
        'ernie_routed_tokens{modality="text",model="e",replica="e/mixed/1",role="mixed"}': 70,
        'ernie_routed_tokens{modality="vision",model="e",replica="e/mixed/1",role="mixed"}': 30,
    }


@pytest.mark.parametrize("news", [[VISION], ReplicaLost("the router is gone")])
async def test_a_replica_that_is_gone_leaves_only_a_pool_without_it(news: list[ReplicaLoad] | Exception) -> None:
    watch = Watch(VISION, DECODE)
    await watch.look()
    watch.backend.load_news = news
    seen = await watch.look()
    assert [(name, value) for name, value in seen.items() if "decode" in name] == [
        ('ernie_ready_replicas{model="m",role="decode"}', 0)
    ]


async def test_who_looks_often_or_at_once_asks_once() -> None:
    watch = Watch(DECODE)
    await asyncio.gather(*(watch.look(0.0) for _ in range(5)))
    await watch.look(gauges.MAX_AGE_S / 2)
    assert watch.backend.num_looks == 1
    await watch.look()
    assert watch.backend.num_looks == 2


async def test_a_backend_that_is_silent_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(FakeBackend):
        async def loads(self) -> list[ReplicaLoad]:
            await asyncio.Event().wait()
            raise AssertionError("nobody sets it")

    monkeypatch.setattr(gauges, "TIMEOUT_S", 0.01)
    response = await Server(Silent()).get("/metrics")
    assert response.status_code == 200
    assert "ernie_ready_replicas" not in response.text


async def test_the_route_shows_them() -> None:
    server = Server()
    server.backend.load_news = [DECODE]
    assert (
        'ernie_running_requests{model="m",replica="m/decode/1",role="decode"} 4' in (await server.get("/metrics")).text
    )


async def look_at(view: ClusterView | Exception, watch: Watch) -> dict[str, float]:
    watch.backend.cluster_news = view
    return {key: value for key, value in (await watch.look()).items() if "actions" not in key}


async def test_each_pool_has_a_count_for_every_phase() -> None:
    """Where a phase has no series, nobody can tell "none" from "unknown"."""
    seen = [key for key in await look_at(VIEW, Watch()) if key.startswith("ernie_replicas{")]
    assert len(seen) == 3 * 4


async def test_an_operators_view_is_shown() -> None:
    seen = await look_at(VIEW, Watch())
    assert {key: value for key, value in seen.items() if value or not key.startswith("ernie_replicas{")} == {
        'ernie_replicas{model="org/m",phase="ready",role="vision"}': 1,
        'ernie_replicas{model="org/m",phase="ready",role="prefill"}': 1,
        'ernie_replicas{model="org/m",phase="switching",role="decode"}': 1,
        'ernie_replicas{model="org/m",phase="draining",role="decode"}': 1,
        'ernie_replicas{model="org/m",phase="starting",role="decode"}': 1,
        'ernie_replica_gpus{model="org/m",role="vision"}': 1,
        'ernie_replica_gpus{model="org/m",role="prefill"}': 1,
        'ernie_replica_gpus{model="org/m",role="decode"}': 4,
        'ernie_needed_replicas{model="org/m",role="prefill"}': 2.3,
        'ernie_needed_replicas{model="org/m",role="decode"}': 1.1,
        'ernie_held_requests{model="org/m"}': 2,
        'ernie_held_requests{model="asleep"}': 0,
        'ernie_budget{unit="GPUs"}': 8,
        'ernie_budget_used{unit="GPUs"}': 6,
        "ernie_open_promises": VIEW.num_promises,
    }


async def test_replicas_that_have_begun_tell_when_and_how_long_they_are_silent() -> None:
    begun = dataclasses.replace(PREFILL, started_s=1700.0, age_s=2.5)
    seen = await look_at(dataclasses.replace(VIEW, replicas=(begun,)), Watch())
    labels = f'{{model="{begun.model}",replica="{begun.replica}",role="{begun.role}"}}'
    assert seen[f"ernie_replica_start_time_seconds{labels}"] == 1700.0
    assert seen[f"ernie_replica_silence_seconds{labels}"] == 2.5


async def test_replicas_that_left_a_phase_leave_a_zero_and_a_router_that_is_gone_leaves_nothing() -> None:
    watch = Watch()
    await look_at(VIEW, watch)
    seen = await look_at(dataclasses.replace(VIEW, replicas=(PREFILL,)), watch)
    assert {value for key, value in seen.items() if key.startswith("ernie_replicas{") and "prefill" not in key} == {0}
    assert await look_at(ReplicaLost("the router is gone"), watch) == {"ernie_open_promises": 0}


async def test_each_decision_is_counted_once_also_those_between_two_looks() -> None:
    watch, older, newer = Watch(), DECISIONS[1:], DecisionView(1001.0, "org/m", "drain", (), "", "")
    looks = [(older[:1], older), (older[:1], older), ([newer], [newer, *DECISIONS]), ([], [])]
    for last, known in looks:
        watch.backend.cluster_news = dataclasses.replace(VIEW, decisions=tuple(last))
        watch.backend.decision_news = known
        await watch.look()
    counted = {key: value for key, value in shown(watch.metrics).items() if "actions" in key}
    assert counted == {
        'ernie_scaling_actions_total{action="drain",model="org/m"}': 2,
        'ernie_scaling_actions_total{action="switch_role",model="org/m"}': 1,
        'ernie_scaling_actions_total{action="note",model=""}': 1,
    }
