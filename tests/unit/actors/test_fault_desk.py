"""The router hands orders about faults on, and tells who did not answer."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from ernie_cluster.actors import fault_desk
from ernie_cluster.actors.cluster_backend import ClusterBackend
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.deployment import ModelDeployment
from ernie_cluster.config.faults import FaultRule, FaultsConfig
from ernie_cluster.config.pool import PoolConfig
from ernie_cluster.errors import Forbidden, ReplicaLost
from ernie_cluster.faults import FaultOrder, Faults
from ernie_cluster.observe.metrics import PrometheusMetrics

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", ["asyncio"])]

ON = FaultsConfig(enabled=True)
RULE = FaultRule("decode.step", "delay", role="decode")


class Actor:
    """A replica that obeys, unless it has a trouble of its own."""

    def __init__(self, role: Any, name: str, trouble: BaseException | asyncio.Event | None = None) -> None:
        self._faults, self._trouble = Faults(role, name, ON), trouble
        self.faults = SimpleNamespace(remote=self._obey)

    async def _obey(self, order: FaultOrder) -> Any:
        if isinstance(self._trouble, asyncio.Event):
            await self._trouble.wait()
        elif self._trouble is not None:
            raise self._trouble
        return self._faults.obey(order)


async def test_all_are_told_and_the_silent_ones_named(monkeypatch: pytest.MonkeyPatch) -> None:
    actors = {
        "d": Actor("decode", "d"),
        "p": Actor("prefill", "p"),
        "dead": Actor("decode", "dead", ReplicaLost("gone")),
        "still": Actor("decode", "still", asyncio.Event()),
    }
    monkeypatch.setattr(fault_desk.ray, "get_actor", lambda name, _: actors[name])
    monkeypatch.setattr(fault_desk, "_ANSWER_S", 0.05)
    infos: Any = {name: SimpleNamespace(actor_name=name) for name in actors}
    router = Faults("router", "router", ON)
    view = await fault_desk.obey(FaultOrder("add", RULE, 9.0), router, infos)
    assert [(f.process, f.fault) for f in view.faults] == [("d", RULE)]
    assert set(view.silent) == {"dead", "still"}
    ours = await fault_desk.obey(FaultOrder("add", FaultRule("router.acquire", "error"), 9.0), router, {})
    assert [f.process for f in ours.faults] == ["router"]


async def test_they_are_refused_unless_they_are_switched_on() -> None:
    model = ModelDeployment("m", "/m", (PoolConfig("mixed", num_cpus=1.0),))
    backend = ClusterBackend("app", ClusterConfig((model,)), PrometheusMetrics())
    with pytest.raises(Forbidden, match=r"faults\.enabled"):
        await backend.faults(FaultOrder("add", RULE, 9.0))
