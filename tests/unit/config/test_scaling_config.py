"""Budgets, bounds and sleep: what follows from a configuration, and what is refused with a word on what to set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.deployment import ModelDeployment
from ernie_cluster.config.engine import EngineConfig
from ernie_cluster.config.pool import PoolConfig
from ernie_cluster.config.scaling import AutoscalerConfig
from ernie_cluster.errors import ConfigError

ENGINE = EngineConfig(block_size=256)


def made(
    pool: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    scaling: Mapping[str, Any] | None = None,
    *,
    is_scaled: bool = True,
) -> ClusterConfig:
    """One model with one mixed pool."""
    return ClusterConfig(
        (ModelDeployment("m", "/folder", (PoolConfig("mixed", **pool or {}),), **{"engine": ENGINE, **(model or {})}),),
        scaling=AutoscalerConfig(**scaling or {}) if is_scaled else None,
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pool": {"min_replicas": 1}, "is_scaled": False}, "min_replicas needs the autoscaler; add `scaling: {}`"),
        ({"pool": {"max_replicas": 2}, "is_scaled": False}, "max_replicas needs the autoscaler"),
        ({"model": {"floor": 0, "idle_to_zero_s": 5.0}, "is_scaled": False}, "idle_to_zero_s needs the autoscaler"),
        ({"model": {"idle_to_zero_s": 5.0}}, "idle_to_zero_s = 5 with floor = 1 and min_replicas = 0: .* set floor: 0"),
        (
            {"pool": {"min_replicas": 1}, "model": {"floor": 0, "idle_to_zero_s": 5.0}},
            "floor = 0 and min_replicas = 1: .* every min_replicas to 0",
        ),
        ({"pool": {"min_replicas": 2}}, "min_replicas = 2 is more than num_replicas = 1.*; raise num_replicas"),
        ({"pool": {"num_replicas": 3, "max_replicas": 2}}, "max_replicas"),
        (
            {"pool": {"num_replicas": 3}, "scaling": {"budget": 2.5}},
            "budget = 2.5 cores.* begin with 3; raise it, or lower",
        ),
        ({"pool": {"num_gpus": 1, "tp": 4}, "scaling": {"budget": 3}}, "budget = 3 GPUs.* begin with 4"),
        ({"scaling": {"budget": -1}}, "budget = -1"),
        ({"scaling": {"interval_s": 0}}, "interval_s = 0"),
        ({"scaling": {"drain_timeout_s": 0}}, "drain_timeout_s = 0"),
        ({"scaling": {"wake_up_timeout_s": -1}}, "wake_up_timeout_s = -1"),
    ],
)
def test_what_cannot_work_is_refused_and_said_how_it_would(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        made(**settings)


def test_a_budget_is_what_the_pools_begin_with_unless_it_is_given() -> None:
    pool = {"num_replicas": 2, "num_gpus": 0.5, "tp": 4}
    assert (made(pool).budget, made(pool).budget_unit) == (4.0, "GPUs")
    assert made(pool, scaling={"budget": 16}).bounds().total_gpus == 16
    assert made(pool, is_scaled=False).budget == 4.0


def test_fractions_of_a_core_fill_a_budget_to_the_last() -> None:
    assert made({"num_replicas": 3, "num_cpus": 0.1}, scaling={"budget": 0.3}).budget == 0.3


def test_only_who_may_sleep_is_waited_for() -> None:
    assert made().wake_up_s("m") == 0
    assert made(model={"floor": 0, "idle_to_zero_s": 9.0}, scaling={"wake_up_timeout_s": 70}).wake_up_s("m") == 70
