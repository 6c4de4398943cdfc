"""What `serve` refuses once it knows the machines, before it starts anything on them."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError

from ernie_cluster.actors import launch
from ernie_cluster.config.api import ApiConfig
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.deployment import ModelDeployment
from ernie_cluster.config.engine import EngineConfig
from ernie_cluster.config.pool import PoolConfig
from ernie_cluster.config.units import GIB
from ernie_cluster.errors import ConfigError
from tests import tiny

SMALL = EngineConfig(block_size=256, kv_cache_bytes=GIB)


def config(num_gpus: float, engine: EngineConfig = SMALL) -> ClusterConfig:
    pool = PoolConfig("mixed", num_gpus=num_gpus)
    return ClusterConfig(models=(ModelDeployment("tiny", tiny.tiny_folder(), (pool,), engine),))


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What Ray says of its nodes; empty at first."""
    nodes: list[dict[str, Any]] = []
    monkeypatch.setattr(launch.ray, "nodes", lambda: nodes)
    return nodes


def node(memory: float, *types: str, alive: bool = True) -> dict[str, Any]:
    kinds = {f"accelerator_type:{t}": 1.0 for t in types}
    return {"Alive": alive, "Resources": {"CPU": 8.0, "memory": memory, **kinds}}


def test_a_pool_fits_on_a_gpu_that_is_there(machines: list[dict[str, Any]]) -> None:
    machines.append(node(GIB, "H100"))
    launch.check_machines(config(num_gpus=1))
    with pytest.raises(
        ConfigError, match=r"model 'tiny' does not fit: mixed .* of h100-80g; set engine.kv_cache_bytes"
    ):
        launch.check_machines(config(num_gpus=1, engine=EngineConfig(block_size=256, kv_cache_bytes=90 * GIB)))


def test_a_gpu_that_is_not_known_is_not_judged(machines: list[dict[str, Any]]) -> None:
    machines.extend([node(GIB, "H100"), node(GIB, "H900")])
    launch.check_machines(config(num_gpus=1, engine=EngineConfig(block_size=256, kv_cache_bytes=90 * GIB)))


def test_pools_without_gpus_need_memory_of_machines_that_live(machines: list[dict[str, Any]]) -> None:
    machines.extend([node(0.6 * GIB), node(8 * GIB, alive=False)])
    with pytest.raises(ConfigError, match=r"these machines have 0\.6 GB of memory"):
        launch.check_machines(config(num_gpus=0))
    machines.append(node(0.6 * GIB))
    launch.check_machines(config(num_gpus=0))


def test_start_checks_first(machines: list[dict[str, Any]]) -> None:
    machines.append(node(GIB / 2))
    said: list[str] = []
    with pytest.raises(ConfigError, match="without GPUs need"):
        launch.start(config(num_gpus=0), said.append, timeout_s=1)
    assert said == []


def gang(kv_placement: Any = "auto", **pool: Any) -> ClusterConfig:
    engine = EngineConfig(kv_cache_bytes=GIB, kv_placement=kv_placement, block_size=256)
    return ClusterConfig(models=(ModelDeployment("tiny", tiny.tiny_folder(), (PoolConfig("mixed", **pool),), engine),))


@pytest.mark.parametrize("kv_placement", ["auto", "split"])
def test_ranks_on_gpus_hold_their_own_kv(kv_placement: str) -> None:
    launch.check(gang(kv_placement, tp=2, dp=2, num_gpus=1))


@pytest.mark.parametrize("kv_placement", ["auto", "shared", "split"])
def test_ranks_on_cpu_may_share_it(kv_placement: str) -> None:
    launch.check(gang(kv_placement, tp=2))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            gang("shared", tp=2, num_gpus=1),
            r"pool mixed: tp = 2 on GPUs with engine.kv_placement = shared; .*use split or auto",
        ),
        (gang(tp=2, num_gpus=0.5), r"tp \* dp = 2 ranks with num_gpus = 0\.5 each; .* set num_gpus to 1"),
        (gang(dp=2, num_gpus=0.25), r"tp \* dp = 2 ranks with num_gpus = 0\.25 each"),
        (gang(tp=4, num_gpus=1), r"num_kv_heads % tp = 2 % 4 = 2"),
    ],
)
def test_what_ranks_cannot_do_on_gpus_is_refused(config: ClusterConfig, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        launch.check(config)


def labelled(*labels: str) -> dict[str, Any]:
    return node(8 * GIB) | {"Labels": dict(label.split("=") for label in labels)}


def test_labels_that_no_node_has_are_named(machines: list[dict[str, Any]]) -> None:
    pools = (PoolConfig("prefill", node_labels=("pool=prefill", "zone=a")), PoolConfig("decode"))
    config = ClusterConfig((ModelDeployment("m", "/m", pools),), api=ApiConfig(node_labels=("front=yes",)))
    machines += [labelled("pool=prefill", "zone=b"), labelled("zone=a"), labelled("front=yes") | {"Alive": False}]
    api, prefill = ("the API and the router", ("front=yes",)), ("pool prefill of 'm'", ("pool=prefill", "zone=a"))
    assert launch.unmatched_labels(config) == [api, prefill]
    machines.append(labelled("front=yes", "more=1"))
    assert launch.unmatched_labels(config) == [prefill]
    machines.append(labelled("zone=a", "pool=prefill"))
    assert launch.unmatched_labels(config) == []


def test_a_router_without_a_node_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    class Absent:
        replicas = status = SimpleNamespace(remote=lambda: None)

    def never(ref: object, timeout: float) -> None:
        assert timeout <= 5.0
        raise GetTimeoutError

    monkeypatch.setattr(launch.ray, "get", never)
    config = ClusterConfig((ModelDeployment("m", "/m", (PoolConfig("mixed"),)),), api=ApiConfig(node_labels=("a=b",)))
    with pytest.raises(ConfigError, match=r"not ready after 5 s: the router has not started; .* api.node_labels = a=b"):
        launch._told_by(Absent, config, 5.0, time.monotonic() + 5.0)
