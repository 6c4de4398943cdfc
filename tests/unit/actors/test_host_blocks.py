"""From a configuration to the blocks that the host's memory behind a KV cache holds."""

from __future__ import annotations

import pytest

from ernie_cluster.actors.load_worker import host_blocks
from ernie_cluster.actors.messages import RankArgs
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.deployment import ModelDeployment
from ernie_cluster.config.engine import EngineConfig
from ernie_cluster.config.kv_layout import KVLayout
from ernie_cluster.config.parallel import Shard
from ernie_cluster.config.pool import PoolConfig
from ernie_cluster.config.published import PUBLISHED
from ernie_cluster.errors import ConfigError

MODEL = PUBLISHED["28b"]


def blocks(host_cache_bytes: int, tp: int = 1) -> int:
    pool = PoolConfig("mixed", tp=tp)
    engine = EngineConfig(host_cache_bytes=host_cache_bytes, dtype="bfloat16")
    config = ClusterConfig((ModelDeployment("m", "/m", (pool,), engine),))
    return host_blocks(RankArgs(config, "m", "mixed", "a", 1.0, Shard(pool.dims, 0)), MODEL)


@pytest.mark.parametrize("tp", [1, 2])
def test_each_rank_keeps_what_its_bytes_hold_of_its_own_heads(tp: int) -> None:
    block_bytes = KVLayout.from_model(MODEL, 16, "bfloat16", tp).block_bytes
    assert [blocks(n, tp) for n in (0, block_bytes, 7 * block_bytes - 1)] == [0, 1, 6]


def test_memory_for_less_than_a_block_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="host_cache_bytes = 917503 holds no block of 917504 bytes; give at least that"
    ):
        blocks(16 * 57_344 - 1)
