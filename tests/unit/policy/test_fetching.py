"""Prefixes from other replicas: when a path has one, and when never."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_cluster.deltas import DeltaLog
from ernie_cluster.policy.admission import Need, Refusal
from ernie_cluster.policy.books import Books
from ernie_cluster.policy.fleet import Fleet
from ernie_cluster.policy.routing import Path, choose_path
from ernie_cluster.policy.snapshot import Demand, ReplicaSnapshot
from tests.unit.policy.test_paths import path_of, with_caches
from tests.unit.policy.test_routing import CLUSTERS, D0, D1, EXCLUDED, LIMITS, M0, P0, P1

CHAIN = tuple(range(1, 63))
LONG = Demand("m", num_prompt_tokens=1000, max_tokens=50, chain=CHAIN)  # 62 blocks of 16 and 8 tokens


def weighed(*replicas: ReplicaSnapshot, token_bytes: int = 1000) -> list[ReplicaSnapshot]:
    return [replace(r, token_bytes=token_bytes) for r in replicas]


def busy(replica: ReplicaSnapshot) -> ReplicaSnapshot:
    return replace(replica, waiting_tokens=900)


# ---- laws


@settings(max_examples=50)
@given(
    CLUSTERS,
    EXCLUDED,
    EXCLUDED,
    st.lists(st.integers(0, len(CHAIN)), min_size=10, max_size=10),
    st.sampled_from([0, 100, 10_000, 10**7]),
)
def test_a_fetch_is_from_a_replica_that_has_it_and_may_be_asked_and_costs_less_than_computing(
    cluster: list[ReplicaSnapshot], exclude: frozenset[str], parted: frozenset[str], depths: list[int], token_bytes: int
) -> None:
    cluster = weighed(
        *(replace(r, total_blocks=200, free_blocks=3 * r.free_blocks) for r in cluster), token_bytes=token_bytes
    )
    caches = {r.replica_id: CHAIN[:depth] for r, depth in zip(cluster, depths, strict=False)}
    fleet = with_caches(cluster, caches)
    path = choose_path(LONG, fleet, LIMITS, exclude=exclude, parted=parted)
    without = choose_path(LONG, fleet, replace(LIMITS, fetch_prefixes=False), exclude=exclude)
    if isinstance(path, Refusal):
        assert path == without
        return
    assert isinstance(without, Path)
    assert without.fetch is None
    if path.fetch is None:
        return
    by_id = {r.replica_id: r for r in cluster}
    source, target = by_id[path.fetch.source], by_id[path.prefill]
    assert source.is_ready
    assert source.replica_id not in (exclude - parted if source.is_draining else exclude)
    assert source.model == "m"
    assert source.role != "vision"
    assert source.block_size == target.block_size
    assert source.replica_id != target.replica_id
    assert path.fetch.num_blocks == len(caches[source.replica_id]) > len(caches[target.replica_id])
    assert 0 < path.fetch.timeout_s <= 2
    assert Need.of(LONG, LIMITS).fits(target)
    if without.prefill == path.prefill:
        assert path.ttft_s < without.ttft_s + 1e-9


@settings(max_examples=30)
@given(st.integers(0, 900), st.integers(1, len(CHAIN)), st.integers(1, 10**7))
def test_a_slower_way_never_attracts(waiting: int, depth: int, token_bytes: int) -> None:
    def path(scale: int) -> Path:
        replicas = weighed(replace(P0, waiting_tokens=waiting), P1, D0, token_bytes=scale * token_bytes)
        return path_of(LONG, with_caches(replicas, {"p0": CHAIN[:depth]}))

    assert path(1).fetch or not path(3).fetch


# ---- tables


@pytest.mark.parametrize("node", ["near", "far"])
def test_what_moves_is_fetched_from_the_replica_that_parts_with_it(node: str) -> None:
    """It has failed nobody, and takes no more."""
    leaving = replace(D1, is_draining=True, node_id=D1.node_id if node == "near" else "elsewhere")
    fleet = with_caches(weighed(P0, D0, leaving), {"d1": CHAIN})
    moved = choose_path(LONG, fleet, LIMITS, exclude={"d1"}, parted={"d1"})
    assert isinstance(moved, Path)
    assert (moved.decode, moved.fetch and moved.fetch.source) == ("d0", "d1")
    failed = choose_path(LONG, fleet, LIMITS, exclude={"d1"})
    assert isinstance(failed, Path)
    assert failed.fetch is None
    well = with_caches(weighed(P0, D0, D1), {"d1": CHAIN})
    stayed = choose_path(LONG, well, LIMITS, exclude={"d1"}, parted={"d1"})
    assert isinstance(stayed, Path)
    assert stayed.fetch is None, "it does not drain, so it has failed"


def test_an_idle_replica_gets_the_prefix_of_a_busy_one() -> None:
    path = path_of(LONG, with_caches(weighed(busy(P0), P1, D0), {"p0": CHAIN}))
    assert path.prefill == "p1"
    assert path.fetch is not None
    assert (path.fetch.source, path.fetch.num_blocks) == ("p0", 62)
    assert dict(path.kinds)["prefill"] == "fetched"
    assert "up to token 992 from p0" in path.reasons[1]
    booked = {p.replica_id: p for p in path.promises}
    assert booked.keys() == {"p1", "d0"}, "a source promises nothing"
    assert (booked["p1"].blocks, booked["p1"].tokens, booked["p1"].items) == (63, 8, CHAIN)


@pytest.mark.parametrize("source", ["d0", "d1"])
def test_decode_replicas_lend_what_they_have_written(source: str) -> None:
    path = path_of(LONG, with_caches(weighed(P0, D0, D1), {source: CHAIN}))
    assert path.fetch is not None
    assert (path.prefill, path.fetch.source) == ("p0", source)


def test_a_mixed_replica_fetches_too() -> None:
    path = path_of(LONG, with_caches(weighed(M0, replace(busy(M0), replica_id="m1")), {"m1": CHAIN}))
    assert (path.prefill, path.fetch is not None) == ("m0", True)


def test_the_nearest_of_equals_lends() -> None:
    replicas = weighed(P0, replace(D0, node_id="far"), D1, token_bytes=100_000)
    path = path_of(LONG, with_caches(replicas, {"d0": CHAIN, "d1": CHAIN}))
    assert path.fetch is not None
    assert path.fetch.source == "d1"


@pytest.mark.parametrize(
    "source",
    [
        replace(busy(P0), is_ready=False),
        replace(busy(P0), is_ready=False, is_draining=True),
        replace(busy(P0), model="other"),
        replace(busy(P0), block_size=8),
        replace(busy(P0), token_bytes=0),
        replace(busy(P0), token_bytes=10**8),  # a prefix takes longer on its way than to be computed
    ],
)
def test_who_does_not_lend(source: ReplicaSnapshot) -> None:
    replicas = [replace(source, token_bytes=source.token_bytes or 1000), *weighed(P1, D0)]
    if source.token_bytes == 0 and source.is_usable and source.model == "m" and source.block_size == 16:
        replicas[0] = source
    assert path_of(LONG, with_caches(replicas, {"p0": CHAIN})).fetch is None


def test_what_is_only_expected_cannot_be_lent() -> None:
    books = Books(heartbeat_timeout_s=1)
    for r in weighed(busy(P0), P1, replace(D0, total_blocks=200, free_blocks=200)):
        books.report(r, now_s=0)
    first = path_of(LONG, books.fleet(0))
    assert first.prefill == "p1"
    books.promise("first", first.promises, deadline_s=9)
    books.report(replace(P1, token_bytes=1000, waiting_tokens=999), now_s=0.5)
    again = path_of(LONG, books.fleet(0.5))
    assert again.fetch is None
    log = DeltaLog()
    for item in CHAIN:
        log.add(item)
    books.cached("p1", log.since(None))
    idle = replace(P0, token_bytes=1000)
    books.report(idle, now_s=0.6)
    assert path_of(LONG, books.fleet(0.6)).fetch is not None


def test_short_prefixes_are_computed() -> None:
    short = replace(LONG, num_prompt_tokens=40, chain=CHAIN[:2])
    assert path_of(short, with_caches(weighed(busy(P0), P1, D0), {"p0": CHAIN[:2]})).fetch is None


def test_it_can_be_switched_off() -> None:
    fleet = with_caches(weighed(busy(P0), P1, D0), {"p0": CHAIN})
    assert path_of(LONG, fleet, replace(LIMITS, fetch_prefixes=False)).fetch is None
    assert path_of(LONG, Fleet.of(weighed(P0, D0))).fetch is None
