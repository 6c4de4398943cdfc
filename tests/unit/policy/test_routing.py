"""Admission and routing: laws over random clusters, then tables of decisions."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_cluster.config.pool import Role
from ernie_cluster.config.router import RouterConfig
from ernie_cluster.errors import ContextTooLong, Overloaded
from ernie_cluster.policy.admission import Need, Refusal, blocks_for, never_fits
from ernie_cluster.policy.books import Books
from ernie_cluster.policy.encoding import choose_encoder
from ernie_cluster.policy.fleet import Fleet
from ernie_cluster.policy.routing import Path, choose_path
from ernie_cluster.policy.snapshot import Demand, Promise, ReplicaSnapshot

LIMITS = RouterConfig(reserve_output_tokens=32, max_queued_tokens=1000, retry_after_s=3)
TEXT = Demand("m", num_prompt_tokens=100, max_tokens=50)  # 100 + 32 tokens: 9 blocks
PICTURE = Demand("m", num_prompt_tokens=100, max_tokens=50, num_media=1, media_tokens=60)


def replica(replica_id: str, role: Role, waiting_tokens: int = 0, free_blocks: int = 100) -> ReplicaSnapshot:
    return ReplicaSnapshot(
        replica_id=replica_id,
        model="m",
        role=role,
        node_id="node-0",
        incarnation="a",
        is_ready=True,
        is_draining=False,
        num_running=0,
        num_waiting=0,
        waiting_tokens=waiting_tokens,
        free_blocks=free_blocks,
        total_blocks=100,
        block_size=16,
    )


P0, P1 = replica("p0", "prefill"), replica("p1", "prefill")
D0, D1 = replica("d0", "decode"), replica("d1", "decode")
V0, V1 = replica("v0", "vision"), replica("v1", "vision")
M0, M1 = replica("m0", "mixed"), replica("m1", "mixed")

REPLICAS = st.builds(
    ReplicaSnapshot,
    replica_id=st.just(""),
    model=st.sampled_from(["m", "m", "m", "other"]),
    role=st.sampled_from(["vision", "prefill", "decode", "mixed"]),
    node_id=st.just("n"),
    incarnation=st.just("a"),
    is_ready=st.sampled_from([True, True, False]),
    is_draining=st.sampled_from([False, False, True]),
    num_running=st.integers(0, 4),
    num_waiting=st.integers(0, 4),
    waiting_tokens=st.sampled_from([0, 5, 400, 999, 1000, 5000]),
    free_blocks=st.integers(0, 40),
    total_blocks=st.sampled_from([40, 80]),
    block_size=st.sampled_from([8, 16]),
)
CLUSTERS = st.lists(REPLICAS, max_size=10).map(
    lambda found: [replace(r, replica_id=f"r{i}") for i, r in enumerate(found)]
)
DEMANDS = st.builds(
    Demand,
    st.just("m"),
    num_prompt_tokens=st.integers(60, 400),
    max_tokens=st.integers(1, 300),
    num_media=st.integers(0, 1),
    media_tokens=st.integers(0, 60),
)
EXCLUDED = st.frozensets(st.sampled_from([f"r{i}" for i in range(10)]), max_size=3)


def choose(
    demand: Demand, cluster: Iterable[ReplicaSnapshot], exclude: Collection[str] = frozenset(), **limits: int
) -> Path | Refusal:
    return choose_path(demand, Fleet.of(cluster), replace(LIMITS, **limits), exclude=exclude)


def can_serve(demand: Demand, cluster: list[ReplicaSnapshot], exclude: frozenset[str]) -> bool:
    """Naively: is there any combination with room?"""

    def any_of(role: Role) -> bool:
        return any(
            r.model == "m"
            and r.role == role
            and r.is_ready
            and not r.is_draining
            and r.replica_id not in exclude
            and (role == "decode" or r.waiting_tokens < 1000)
            and (role == "vision" or r.free_blocks * r.block_size >= prompt + (role != "prefill") * answer)
            for r in cluster
        )

    prompt, answer = demand.num_prompt_tokens, min(demand.max_tokens, 32)
    has_eyes = not demand.num_media or any_of("vision")
    return has_eyes and (any_of("mixed") or (any_of("prefill") and any_of("decode")))


@given(DEMANDS, CLUSTERS, EXCLUDED)
def test_a_path_has_room_on_usable_replicas_of_the_right_role(
    demand: Demand, cluster: list[ReplicaSnapshot], exclude: frozenset[str]
) -> None:
    path = choose(demand, cluster, exclude)
    if isinstance(path, Refusal):
        return
    by_id = {r.replica_id: r for r in cluster}
    chosen = [by_id[i] for i in (path.encoder, path.prefill, path.decode) if i is not None]
    assert all(r.is_ready and not r.is_draining and r.model == "m" for r in chosen)
    assert all(map(Need.of(demand, LIMITS).fits, chosen))
    assert not exclude & {r.replica_id for r in chosen}
    assert (path.encoder is None) == (demand.num_media == 0)
    assert by_id[path.encoder].role == "vision" if path.encoder else True
    roles = (by_id[path.prefill].role, by_id[path.decode].role)
    assert roles == (("mixed", "mixed") if path.prefill == path.decode else ("prefill", "decode"))


@given(DEMANDS, CLUSTERS, EXCLUDED)
def test_a_request_is_refused_exactly_when_nothing_fits(
    demand: Demand, cluster: list[ReplicaSnapshot], exclude: frozenset[str]
) -> None:
    decision = choose(demand, cluster, exclude)
    is_possible = never_fits(demand, Fleet.of(cluster)) is None and can_serve(demand, cluster, exclude)
    assert isinstance(decision, Path) == is_possible
    if isinstance(decision, Refusal):
        assert decision.reason.strip(" ;:") not in ("", "'m'")
        assert (decision.retry_after_s is None) == (never_fits(demand, Fleet.of(cluster)) is not None)


@given(DEMANDS, CLUSTERS, EXCLUDED, st.randoms(use_true_random=False))
def test_the_order_of_replicas_does_not_matter(
    demand: Demand, cluster: list[ReplicaSnapshot], exclude: frozenset[str], random
) -> None:  # type: ignore[no-untyped-def]
    shuffled = random.sample(cluster, len(cluster))
    assert choose(demand, shuffled, exclude) == choose(demand, cluster, exclude)


@given(CLUSTERS, st.lists(DEMANDS, max_size=12))
def test_booked_paths_never_overcommit_blocks(cluster: list[ReplicaSnapshot], demands: list[Demand]) -> None:
    books = Books(heartbeat_timeout_s=1)
    for r in cluster:
        books.report(r, now_s=0)
    taken = dict.fromkeys((r.replica_id for r in cluster), 0)
    for i, demand in enumerate(demands):
        path = choose_path(demand, books.fleet(0), LIMITS)
        assert path == choose(demand, books.view(0))
        if isinstance(path, Path):
            books.promise(str(i), path.promises, deadline_s=9)
            assert {p.replica_id for p in path.promises} == {path.encoder, path.prefill, path.decode} - {None}
            for p in path.promises:
                taken[p.replica_id] += p.blocks
        books.check()
    assert all(taken[r.replica_id] <= r.free_blocks for r in cluster)


@given(DEMANDS, st.sampled_from([[V0, P0, D0], [V0, M0]]))
def test_an_idle_cluster_takes_whatever_can_ever_fit(demand: Demand, cluster: list[ReplicaSnapshot]) -> None:
    assert isinstance(choose(demand, cluster), Path) == (never_fits(demand, Fleet.of(cluster)) is None)


@pytest.mark.parametrize(
    ("demand", "cluster", "chosen"),
    [
        (TEXT, [P0, D0], (None, "p0", "d0")),
        (TEXT, [V0, P1, D1, P0, D0], (None, "p0", "d0")),  # ties go to the lower id
        (PICTURE, [V0, P0, D0], ("v0", "p0", "d0")),
        (PICTURE, [replica("v0", "vision", 7), replica("v1", "vision", 6), M0], ("v1", "m0", "m0")),
        (TEXT, [replica("p0", "prefill", 11), replica("p1", "prefill", 10), D0], (None, "p1", "d0")),
        (TEXT, [P0, replica("d0", "decode", free_blocks=50), D1], (None, "p0", "d1")),
        (TEXT, [P0, replica("d0", "decode", waiting_tokens=10**6)], (None, "p0", "d0")),  # decode has no queue
        (TEXT, [M1, M0], (None, "m0", "m0")),
        (TEXT, [replica("m0", "mixed", free_blocks=50), M1], (None, "m1", "m1")),  # idle: the emptier one
        (TEXT, [replica("m0", "mixed", 50), P0, D0], (None, "p0", "d0")),  # the shorter queue
        (TEXT, [replica("m0", "mixed", 5), P0, D0], (None, "m0", "m0")),  # shorter by less than a hand-over
        (TEXT, [replica("p0", "prefill", 5), M0, D0], (None, "m0", "m0")),
        (TEXT, [P0, M0], (None, "m0", "m0")),  # a prefill without a decode partner is no start
        (TEXT, [replace(P0, is_ready=False), P1, D0], (None, "p1", "d0")),
        (TEXT, [P0, replace(D0, is_draining=True), D1], (None, "p0", "d1")),
        (TEXT, [P0, replica("d0", "decode", free_blocks=9)], (None, "p0", "d0")),  # just enough
    ],
)
def test_choices(demand: Demand, cluster: list[ReplicaSnapshot], chosen: tuple[str | None, str, str]) -> None:
    path = choose(demand, cluster)
    assert isinstance(path, Path)
    assert (path.encoder, path.prefill, path.decode) == chosen


@pytest.mark.parametrize(
    ("demand", "cluster", "reason"),
    [
        (TEXT, [], "'m': no prefill replica is ready; no decode replica is ready"),
        (TEXT, [P0, replace(D0, model="other")], "'m': no decode replica is ready"),
        (TEXT, [replace(M0, is_ready=False)], "'m': no mixed replica is ready"),
        (PICTURE, [P0, D0], "'m': no vision replica is ready"),
        (
            PICTURE,
            [replica("v0", "vision", 1000), M0],
            "'m': every vision replica is full (at best 1000 tokens wait, limit 1000)",
        ),
        (
            TEXT,
            [replica("p0", "prefill", 1500), replica("p1", "prefill", 1200), D0],
            "'m': every prefill replica is full (at best 1200 tokens wait, limit 1000, 7 blocks needed, 100 free)",
        ),
        (
            TEXT,
            [P0, replica("d0", "decode", free_blocks=8), replica("d1", "decode", free_blocks=7)],
            "'m': every decode replica is full (at best 9 blocks needed, 8 free)",
        ),
        (
            TEXT,
            [replica("m0", "mixed", 1500, free_blocks=3)],
            "'m': every mixed replica is full (at best 1500 tokens wait, limit 1000, 9 blocks needed, 3 free)",
        ),
    ],
)
def test_refusals_that_pass(demand: Demand, cluster: list[ReplicaSnapshot], reason: str) -> None:
    assert choose(demand, cluster) == Refusal(reason, retry_after_s=3)
    error = Refusal(reason, retry_after_s=3).to_error()
    assert isinstance(error, Overloaded)
    assert (str(error), error.retry_after_s) == (reason, 3)


@pytest.mark.parametrize(
    ("demand", "what"),
    [
        (Demand("m", 1601, 1), "prompt = 1601 tokens"),
        (Demand("m", 1500, 101), "prompt + max_tokens = 1601 tokens"),
    ],
)
@pytest.mark.parametrize("cluster", [[P0, D0], [M0], [replace(P0, is_ready=False), replace(D0, free_blocks=0)]])
def test_refusals_for_good(demand: Demand, what: str, cluster: list[ReplicaSnapshot]) -> None:
    decision = choose(demand, cluster)
    assert isinstance(decision, Refusal)
    assert decision.retry_after_s is None
    assert decision.reason.startswith(f"{what}, but the largest replica of 'm' holds 1600")
    assert isinstance(decision.to_error(), ContextTooLong)


def test_replicas_of_unknown_size_say_nothing_about_what_fits() -> None:
    unknown = [replace(P0, total_blocks=0), replace(D0, total_blocks=0)]
    assert never_fits(Demand("m", 10**6, 1), Fleet.of(unknown)) is None


def test_excluded_replicas_are_passed_over() -> None:
    path = choose(TEXT, [P0, P1, D0, D1], {"p0", "d0"})
    assert isinstance(path, Path)
    assert (path.prefill, path.decode) == ("p1", "d1")


def test_a_split_path_says_why_and_what_it_takes() -> None:
    path = choose(PICTURE, [V0, V1, P0, P1, D0])
    assert isinstance(path, Path)
    assert not path.is_mixed
    assert path.reasons == (
        "vision v0: load, 60 tokens to encode, 0 wait",
        "prefill p0: 0 of 100 tokens cached, 0 wait, first token in 0.072 s, best of 2",
        "decode d0: 0 run, on the same node, 0 tokens held, needs 9 of 100 free blocks",
    )
    assert path.kinds == (("vision", "load"), ("prefill", "load"), ("decode", "load"))
    assert path.promises == (
        Promise("v0", media_tokens=60),
        Promise("p0", blocks=7, tokens=100),
        Promise("d0", blocks=9),
    )


def test_a_mixed_path_says_why_and_what_it_takes() -> None:
    path = choose(TEXT, [M0])
    assert isinstance(path, Path)
    assert path.is_mixed
    assert path.reasons == (
        "vision none: no media",
        "mixed m0: 0 of 100 tokens cached, 0 wait, first token in 0.030 s, best of 1, needs 9 of 100 free blocks",
    )
    assert path.kinds == (("prefill", "load"), ("decode", "local"))
    assert path.promises == (Promise("m0", blocks=9, tokens=100),)


@pytest.mark.parametrize(("prompt", "max_tokens", "blocks"), [(30, 8, 3), (16, 16, 2), (16, 17, 3), (1, 10**9, 3)])
def test_blocks_needed(prompt: int, max_tokens: int, blocks: int) -> None:
    need = Need.of(Demand("m", prompt, max_tokens), LIMITS)
    assert blocks_for(need.tokens(D0), D0) == blocks_for(need.tokens(M0), M0) == blocks
    assert blocks_for(need.tokens(P0), P0) == -(-prompt // 16)


@given(CLUSTERS, st.integers(1, 400), EXCLUDED)
def test_a_picture_without_a_prompt_needs_a_vision_replica_only(
    cluster: list[ReplicaSnapshot], num_tokens: int, exclude: frozenset[str]
) -> None:
    roomy = [
        r
        for r in cluster
        if r.model == "m"
        and r.role == "vision"
        and r.is_usable
        and r.replica_id not in exclude
        and r.waiting_tokens < LIMITS.max_queued_tokens
    ]
    demand, fleet = Demand("m", num_tokens, 1, num_media=1, media_tokens=num_tokens), Fleet.of(cluster)
    found = choose_encoder(demand, fleet, LIMITS, exclude=exclude)
    if isinstance(found, Refusal):
        assert not roomy
        assert isinstance(found.to_error(), Overloaded)
        return
    chosen = next(r for r in roomy if r.replica_id == found.replica_id)
    assert chosen.waiting_tokens == min(r.waiting_tokens for r in roomy)
    assert found == Promise(chosen.replica_id, media_tokens=num_tokens)
