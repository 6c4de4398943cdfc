"""Ways to compare with: blind, and yet within what may be used."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_cluster.config.router import RouterConfig
from ernie_cluster.policy.baselines import Baseline, RoundRobin, TwoChoices, baseline_of, narrowed
from ernie_cluster.policy.fleet import Fleet
from ernie_cluster.policy.routing import Path, choose_path
from ernie_cluster.policy.snapshot import ReplicaSnapshot
from tests.unit.policy.test_fetching import CHAIN, LONG, weighed, with_caches
from tests.unit.policy.test_routing import D0, D1, P0

ONE = ReplicaSnapshot("decode-0", "m", "decode", "n", "life", True, False, 0, 0, 0, 10, 10, 16)
BASELINES = st.one_of(st.builds(RoundRobin), st.builds(TwoChoices, st.builds(random.Random, st.integers())))


@given(
    BASELINES,
    st.lists(st.tuples(st.sampled_from(["vision", "prefill", "decode"]), st.booleans(), st.integers(0, 3)), max_size=9),
    st.frozensets(st.integers(0, 8)),
)
def test_one_is_left_of_each_pool_that_has_any(
    baseline: Baseline, kinds: list[tuple[str, bool, int]], excluded: frozenset[int]
) -> None:
    there = [
        replace(ONE, replica_id=str(i), role=role, is_draining=is_draining, num_running=n)  # type: ignore[arg-type]
        for i, (role, is_draining, n) in enumerate(kinds)
    ]
    exclude = frozenset(map(str, excluded))
    left_out = narrowed(baseline, Fleet.of([*there, replace(ONE, replica_id="other", model="x")]), "m", exclude)
    assert left_out >= exclude
    assert "other" not in left_out
    takes = [r for r in there if r.is_usable and r.replica_id not in exclude]
    left = Counter(r.role for r in takes if r.replica_id not in left_out)
    assert left == dict.fromkeys({r.role for r in takes}, 1)


def test_in_turn_is_in_turn_in_each_pool() -> None:
    fleet, baseline = (
        Fleet.of([ONE, replace(ONE, replica_id="decode-1"), replace(ONE, replica_id="p", role="prefill")]),
        RoundRobin(),
    )
    seen = [narrowed(baseline, fleet, "m", ()) for _ in range(4)]
    assert seen == [{"decode-1"}, {"decode-0"}, {"decode-1"}, {"decode-0"}]


def test_of_two_the_less_busy() -> None:
    busy, idle = replace(ONE, num_running=3), replace(ONE, replica_id="decode-1", num_running=1, num_waiting=1)
    assert narrowed(TwoChoices(random.Random(0)), Fleet.of([busy, idle]), "m", ()) == {"decode-0"}


@pytest.mark.parametrize(("policy", "kind"), [("round_robin", RoundRobin), ("two_choices", TwoChoices)])
def test_they_know_nothing_of_caches(policy: str, kind: type) -> None:
    limits = RouterConfig(policy=policy)  # type: ignore[arg-type]
    assert isinstance(baseline_of(limits, random.Random(0)), kind)
    fleet = with_caches(weighed(P0, D0, D1), {"d1": CHAIN})
    blind, told = (choose_path(LONG, fleet, of) for of in (limits, RouterConfig()))
    assert isinstance(blind, Path)
    assert isinstance(told, Path)
    assert (blind.fetch, told.fetch and told.fetch.source) == (None, "d1")


def test_costs_need_no_baseline() -> None:
    assert baseline_of(RouterConfig(), random.Random(0)) is None
