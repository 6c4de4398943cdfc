"""How often replicas are asked: often where they are few, and never more than the router can take in."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_cluster.config.router import RouterConfig
from ernie_cluster.policy.pace import pause_s

LIMITS = RouterConfig(snapshot_interval_s=0.1, heartbeat_timeout_s=5.0)


@settings(max_examples=50)
@given(st.integers(1, 10_000))
def test_all_together_tell_what_one_process_can_take_in_and_nobody_seems_dead(num_replicas: int) -> None:
    pause = pause_s(num_replicas, LIMITS)
    assert num_replicas / pause <= 4000
    assert LIMITS.snapshot_interval_s <= pause < LIMITS.heartbeat_timeout_s
    assert pause <= pause_s(num_replicas + 1, LIMITS)


@pytest.mark.parametrize(("num_replicas", "pause"), [(1, 0.1), (133, 0.1), (1000, 0.75), (100_000, 2.5)])
def test_pauses(num_replicas: int, pause: float) -> None:
    assert pause_s(num_replicas, LIMITS) == pytest.approx(pause)


def test_a_configured_interval_is_a_least_one() -> None:
    assert pause_s(1000, RouterConfig(snapshot_interval_s=1.0)) == 1.0
