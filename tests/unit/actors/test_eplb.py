"""From a pool's configuration to the rule by which its ranks move experts."""

from __future__ import annotations

from ernie_cluster.actors.load_worker import rule_of
from ernie_cluster.actors.messages import RankArgs
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.deployment import ModelDeployment
from ernie_cluster.config.experts import dealt
from ernie_cluster.config.parallel import Shard
from ernie_cluster.config.pool import EplbConfig, PoolConfig


def args(eplb: EplbConfig) -> RankArgs:
    pool = PoolConfig("decode", tp=2, eplb=eplb)
    config = ClusterConfig((ModelDeployment("m", "/m", (PoolConfig("prefill"), pool)),))
    return RankArgs(config, "m", "decode", "a", 1.0, Shard(pool.dims, 1))


def test_experts_stay_unless_their_pool_says_otherwise() -> None:
    assert rule_of(args(EplbConfig(redundant_experts=3))) is None


def test_a_pool_says_when_and_for_how_much_experts_move() -> None:
    table = dealt(4, 1, args(EplbConfig()).shard.dims)
    for min_gain, moves in ((0.05, True), (0.9, False)):
        rule = rule_of(args(EplbConfig(enabled=True, interval_steps=7, min_gain=min_gain)))
        assert rule is not None
        assert rule.interval_steps == 7
        assert (rule.rebalance([[10.0, 10.0, 1.0, 1.0]], [table], 1) != [table]) is moves
