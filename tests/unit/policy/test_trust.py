"""Whom a request does not meet: nobody bad where there is somebody good, and never nobody at all without need."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_cluster.policy.fleet import Fleet
from ernie_cluster.policy.snapshot import ReplicaSnapshot
from ernie_cluster.policy.trust import to_avoid

ONE = ReplicaSnapshot("decode-0", "m", "decode", "n", "life", True, False, 0, 0, 0, 10, 10, 16)
TWO = replace(ONE, replica_id="decode-1")
PREFILL = replace(ONE, replica_id="prefill-0", role="prefill")
OTHER = replace(ONE, replica_id="other-0", model="other")
IDS = st.frozensets(st.sampled_from(["decode-0", "decode-1", "prefill-0", "other-0", "gone"]))


@pytest.mark.parametrize(
    ("failed", "shunned", "avoided"),
    [
        ("", "", ""),
        ("decode-0", "", "decode-0"),
        ("", "decode-0", "decode-0"),
        ("decode-0", "decode-1", "decode-0"),  # it may only be slow
        ("decode-0 decode-1", "", ""),  # they say that they are well
        ("decode-0 decode-1", "decode-1", "decode-1"),
        ("", "decode-0 decode-1", ""),
        ("decode-0 decode-1", "decode-0 decode-1", "decode-0 decode-1"),  # they failed, and say nothing since
        ("prefill-0", "", ""),
        ("", "prefill-0 decode-1", "decode-1"),
        ("gone", "other-0", ""),
    ],
)
def test_who_is_avoided(failed: str, shunned: str, avoided: str) -> None:
    fleet = Fleet.of((ONE, TWO, PREFILL, OTHER))
    assert to_avoid(fleet, "m", frozenset(failed.split()), frozenset(shunned.split())) == set(avoided.split())


@given(IDS, IDS, st.booleans())
def test_nobody_is_served_worse_than_need_be(
    failed: frozenset[str], shunned: frozenset[str], is_draining: bool
) -> None:
    """Of each pool those are left that are best, and those alone; who takes no work counts for nothing."""
    fleet = Fleet.of((replace(ONE, is_draining=is_draining), TWO, PREFILL, OTHER))
    avoided = to_avoid(fleet, "m", failed, shunned)
    for pool in ({"decode-1"} if is_draining else {"decode-0", "decode-1"}, {"prefill-0"}):
        left = pool - avoided
        worst = {replica: 2 * (replica in failed) + (replica in shunned) for replica in pool}
        best = min(worst.values())
        assert left == ({r for r in pool if worst[r] == best} if best < 3 else set())
        assert not avoided & (pool - failed - shunned)
