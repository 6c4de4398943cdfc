"""What decides between paths that all have room: caches, queues, links and what others lose. Laws, then tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_cluster.config.router import RouterConfig
from ernie_cluster.deltas import DeltaLog
from ernie_cluster.policy.admission import Refusal
from ernie_cluster.policy.books import Books
from ernie_cluster.policy.cost import decode_s, prefill_s, queue_s
from ernie_cluster.policy.fleet import Fleet
from ernie_cluster.policy.ring import Ring
from ernie_cluster.policy.routing import Path, choose_path
from ernie_cluster.policy.snapshot import Demand, Picture, Promise, Rates, ReplicaSnapshot
from tests.unit.policy.test_routing import (
    CLUSTERS,
    D0,
    D1,
    DEMANDS,
    LIMITS,
    M0,
    P0,
    P1,
    TEXT,
    V0,
    V1,
    replica,
)

CHAIN = (11, 12, 13, 14, 15, 16)
PROMPT = replace(TEXT, chain=CHAIN)  # 100 tokens, 6 blocks of 16 and 4 tokens


def with_caches(replicas: Iterable[ReplicaSnapshot], caches: Mapping[str, Iterable[int]]) -> Fleet:
    fleet = Fleet.of(replicas)
    for replica_id, items in caches.items():
        member, log = fleet.member(replica_id), DeltaLog()
        assert member is not None
        for item in items:
            log.add(item)
        fleet.holders.apply(member.slot, log.since(None))
    return fleet


def path_of(demand: Demand, fleet: Fleet, limits: RouterConfig = LIMITS) -> Path:
    path = choose_path(demand, fleet, limits)
    assert isinstance(path, Path), path
    return path


# ---- laws


@settings(max_examples=50)
@given(DEMANDS, CLUSTERS, st.integers(0, 9), st.integers(0, 5000), st.integers(0, 9), st.integers(0, 40))
def test_more_load_never_attracts_work(
    demand: Demand, cluster: list[ReplicaSnapshot], which: int, tokens: int, running: int, blocks: int
) -> None:
    before = choose_path(demand, Fleet.of(cluster), LIMITS)
    loaded = [
        replace(
            r,
            waiting_tokens=r.waiting_tokens + tokens,
            num_running=r.num_running + running,
            free_blocks=max(0, r.free_blocks - blocks),
        )
        if r.replica_id == f"r{which}"
        else r
        for r in cluster
    ]
    after = choose_path(demand, Fleet.of(loaded), LIMITS)
    if isinstance(before, Path) and isinstance(after, Path):
        used = {before.encoder, before.prefill, before.decode}
        assert f"r{which}" in used or f"r{which}" not in {after.encoder, after.prefill, after.decode}


@settings(max_examples=50)
@given(st.integers(0, 10**5), st.integers(0, 10**5), st.integers(0, 60), st.integers(0, 60), st.integers(0, 100))
def test_costs_grow_with_load(tokens: int, more: int, running: int, extra: int, free: int) -> None:
    idle, busy = replica("p", "prefill", tokens), replica("p", "prefill", tokens + more)
    assert queue_s(idle) <= queue_s(busy)
    assert prefill_s(idle, tokens) <= prefill_s(idle, tokens + more)
    d = replace(D0, num_running=running, free_blocks=free)
    assert decode_s(d, 9) <= decode_s(replace(d, num_running=running + extra), 9)
    assert decode_s(d, 9) <= decode_s(replace(d, free_blocks=max(0, free - extra)), 9)


@settings(max_examples=50)
@given(CLUSTERS, st.randoms(use_true_random=False), st.lists(st.integers(0, 9), max_size=20))
def test_a_fleet_is_what_was_put_last(cluster: list[ReplicaSnapshot], random, churn: list[int]) -> None:  # type: ignore[no-untyped-def]
    fleet, state = Fleet(), {r.replica_id: r for r in cluster}
    for r in random.sample(cluster, len(cluster)):
        fleet.put(replace(r, waiting_tokens=r.waiting_tokens + 7))
    for i in churn:
        key = f"r{i}"
        fleet.drop(key)
        fleet.check()
        if key in state:
            fleet.put(state[key])
    for r in cluster:
        fleet.put(r)
    fleet.check()
    assert choose_path(TEXT, fleet, LIMITS) == choose_path(TEXT, Fleet.of(cluster), LIMITS)


@settings(max_examples=30)
@given(st.integers(2, 6), st.lists(st.integers(1, 200), min_size=1, max_size=25))
def test_nobody_starves_while_others_have_room(num_replicas: int, sizes: list[int]) -> None:
    """Booked work spreads: with one prompt for all, the busiest has no more than the idlest and one prompt on top."""
    books = Books(heartbeat_timeout_s=1)
    for i in range(num_replicas):
        books.report(replica(f"m{i}", "mixed", free_blocks=100_000, waiting_tokens=0), now_s=0)
        books.report(replace(replica(f"m{i}", "mixed"), free_blocks=100_000, total_blocks=100_000), now_s=0)
    for n, size in enumerate(sizes):
        path = path_of(Demand("m", size, 1), books.fleet(0), replace(LIMITS, max_queued_tokens=10**9))
        books.promise(str(n), path.promises, deadline_s=9)
    waiting = [r.waiting_tokens for r in books.view(0)]
    assert max(waiting) <= min(waiting) + max(sizes) + 200  # a decoding neighbour costs as much as some tokens


# ---- prompts


@pytest.mark.parametrize(
    ("caches", "waiting", "chosen", "kind"),
    [
        ({}, 0, "p0", "load"),
        ({"p1": CHAIN[:3]}, 0, "p1", "prefix"),
        ({"p0": CHAIN[:3], "p1": CHAIN[:4]}, 0, "p1", "prefix"),
        ({"p1": (1, 2, 3)}, 0, "p0", "load"),  # another prompt
        ({"p1": CHAIN[:3]}, 90, "p1", "prefix"),  # a queue shorter than what the cache saves, for the next one as well
        ({"p1": CHAIN[:3]}, 100, "p0", "load"),  # and longer
    ],
)
def test_a_cached_prefix_attracts(caches: dict[str, tuple[int, ...]], waiting: int, chosen: str, kind: str) -> None:
    path = path_of(PROMPT, with_caches([P0, replace(P1, waiting_tokens=waiting), D0], caches))
    assert path.prefill == chosen
    assert dict(path.kinds)["prefill"] == kind


def test_what_is_cached_is_not_promised_as_work() -> None:
    path = path_of(PROMPT, with_caches([P0, D0], {"p0": CHAIN[:4], "d0": CHAIN[:5]}))
    assert path.promises == (
        Promise("p0", blocks=7, tokens=36, items=CHAIN[4:]),
        Promise("d0", blocks=9, items=CHAIN[5:]),
    )


def test_a_prompt_that_was_just_sent_somewhere_is_cached_there_soon() -> None:
    books = Books(heartbeat_timeout_s=1)
    for r in (P0, P1, D0):
        books.report(r, now_s=0)
    books.report(replace(P0, waiting_tokens=10), now_s=0)
    first = path_of(PROMPT, books.fleet(0))
    assert first.prefill == "p1"
    books.promise("r1", first.promises, deadline_s=9)
    books.confirm("r1", "p1", now_s=0)
    books.report(replace(P1, waiting_tokens=20), now_s=0.5)  # more to do than the other, but the prompt will be there
    assert path_of(PROMPT, books.fleet(0.5)).prefill == "p1"
    other = replace(PROMPT, chain=tuple(c + 100 for c in CHAIN))
    assert path_of(other, books.fleet(0.5)).prefill == "p0"


# ---- partners


def test_kv_stays_on_its_node() -> None:
    far = replace(D0, node_id="node-1")
    heavy = replace(P0, token_bytes=100_000)
    assert path_of(TEXT, Fleet.of([heavy, far, D1])).decode == "d1"


def test_a_partner_that_holds_the_prompt_needs_less_sent() -> None:
    heavy = replace(P0, token_bytes=100_000)
    assert path_of(PROMPT, with_caches([heavy, D0, D1], {"d1": CHAIN})).decode == "d1"


@pytest.mark.parametrize(
    ("d0", "d1"),
    [
        (replace(D0, num_running=4), D1),
        (replace(D0, free_blocks=50), D1),
        (replace(D0, rates=Rates(step_s=0.05)), D1),
        (replace(D0, num_waiting=4), D1),
    ],
)
def test_answers_are_written_where_they_are_written_fastest(d0: ReplicaSnapshot, d1: ReplicaSnapshot) -> None:
    assert path_of(TEXT, Fleet.of([P0, d0, d1])).decode == "d1"


def test_a_prompt_goes_where_prompts_are_read_fastest() -> None:
    slow = replace(P0, rates=Rates(token_s=0.001))
    assert path_of(TEXT, Fleet.of([slow, replace(P1, waiting_tokens=100), D0])).prefill == "p1"


def test_a_mixed_replica_whose_answers_would_stand_still_is_spared() -> None:
    busy = replace(M0, num_running=3, rates=Rates(sequence_s=0))
    assert path_of(TEXT, Fleet.of([busy, P0, D0])).prefill == "p0"
    assert path_of(replace(TEXT, num_prompt_tokens=1), Fleet.of([replace(busy, num_running=0), P0, D0])).prefill == "m0"


def test_a_short_prompt_may_be_answered_where_it_was_read() -> None:
    allowed = replace(LIMITS, local_decode_tokens=100)
    assert not path_of(TEXT, Fleet.of([P0, D0])).is_mixed
    path = path_of(TEXT, Fleet.of([P0, D0]), allowed)
    assert (path.prefill, path.decode) == ("p0", "p0")
    assert path.promises == (Promise("p0", blocks=9, tokens=100),)
    assert not path_of(replace(TEXT, num_prompt_tokens=101), Fleet.of([P0, D0]), allowed).is_mixed
    full = replace(P0, free_blocks=8)  # enough for the prompt alone
    assert path_of(TEXT, Fleet.of([full, D0]), allowed).decode == "d0"


# ---- pictures


def seen_by(*pictures: int, end: int = 60) -> Demand:
    media = tuple(Picture(item, end, 20) for item in pictures)
    return replace(PROMPT, num_media=len(media), media_tokens=20 * len(media), pictures=media)


def test_a_picture_goes_where_it_is_known() -> None:
    for holder in ("v0", "v1"):
        path = path_of(seen_by(77), with_caches([V0, V1, P0, D0], {holder: [77]}))
        assert path.encoder == holder
        assert path.promises[0] == Promise(holder, media_tokens=0)
        assert path.kinds[0] == ("vision", "cached")


def test_different_pictures_never_look_equal() -> None:
    path = path_of(seen_by(78), with_caches([V0, V1, P0, D0], {"v0": [77], "v1": [77]}))
    assert path.promises[0] == Promise(str(path.encoder), media_tokens=20, items=(78,))
    assert path.kinds[0] == ("vision", "home")


def test_pictures_under_a_cached_prefix_need_no_encoder() -> None:
    path = path_of(seen_by(77, end=60), with_caches([V0, P0, D0], {"p0": CHAIN[:4]}))
    assert path.promises[0] == Promise("v0", media_tokens=0)
    path = path_of(seen_by(77, end=65), with_caches([V0, P0, D0], {"p0": CHAIN[:4]}))
    assert path.promises[0] == Promise("v0", media_tokens=20, items=(77,))


def test_the_same_picture_twice_is_encoded_once() -> None:
    assert path_of(seen_by(77, 77), Fleet.of([V0, P0, D0])).promises[0] == Promise("v0", media_tokens=20, items=(77,))


def test_pictures_have_homes_and_leave_them_when_those_are_busy() -> None:
    def homes(fleet: Fleet) -> dict[int, str | None]:
        return {item: path_of(seen_by(item), fleet).encoder for item in range(1, 2**64, 2**58)}

    idle = homes(Fleet.of([V0, V1, P0, D0]))
    assert min(Counter(idle.values()).values()) > 10
    assert homes(Fleet.of([V1, V0, P0, D0])) == idle
    assert homes(Fleet.of([replace(V0, waiting_tokens=5), V1, P0, D0])) == idle  # less than encoding it again costs
    assert set(homes(Fleet.of([replace(V0, waiting_tokens=900), V1, P0, D0])).values()) == {"v1"}
    v2 = replica("v2", "vision")
    assert all(after in (idle[item], "v2") for item, after in homes(Fleet.of([V0, V1, v2, P0, D0])).items())


def test_a_ring_forgets_who_leaves() -> None:
    ring = Ring()
    for slot, name in enumerate("abc"):
        ring.add(name, slot)
    before = [next(ring.homes(item)) for item in range(1, 2**64, 2**57)]
    ring.remove("b")
    after = [next(ring.homes(item)) for item in range(1, 2**64, 2**57)]
    assert all(a == b for a, b in zip(after, before, strict=True) if b != 1)
    assert 1 not in after
    assert list(Ring().homes(5)) == []


# ---- refusals


def retry_of(*cluster: ReplicaSnapshot) -> float:
    refusal = choose_path(TEXT, Fleet.of(cluster), replace(LIMITS, retry_after_s=0.001))
    assert isinstance(refusal, Refusal)
    assert refusal.retry_after_s is not None
    return refusal.retry_after_s


def test_a_retry_is_worth_while_when_the_queue_has_room() -> None:
    assert retry_of(replace(P0, waiting_tokens=1999, rates=Rates(token_s=0.001)), D0) == pytest.approx(1.0)
    assert retry_of(replace(P0, waiting_tokens=5999, rates=Rates(token_s=0.001)), D0) == pytest.approx(5.0)
    idle, busy = replace(P0, waiting_tokens=1099), replace(P1, waiting_tokens=9999)
    assert retry_of(idle, busy, D0) == retry_of(idle, D0)  # the first one that has room counts
    assert retry_of(replace(P0, waiting_tokens=10**7), D0) == 60


def test_a_retry_is_worth_while_when_answers_have_ended() -> None:
    few, more = replace(D0, free_blocks=8), replace(D0, free_blocks=0)
    assert 0.001 < retry_of(P0, few) < retry_of(P0, more)
    assert retry_of(P0, replace(more, rates=Rates(step_s=0.1))) > retry_of(P0, more)
