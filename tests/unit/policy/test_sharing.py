"""Pictures of one request at several encoders: laws, then what speaks for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_cluster.policy.cost import encode_s
from ernie_cluster.policy.fleet import Fleet
from ernie_cluster.policy.routing import EncoderShare, Path
from ernie_cluster.policy.sharing import Candidate, shared
from ernie_cluster.policy.snapshot import Demand, Picture
from tests.unit.policy.test_paths import PROMPT, path_of, with_caches
from tests.unit.policy.test_routing import D0, P0, V0, V1, replica

LARGE = 150
"""Tokens of a picture that takes a while."""


def showing(*items: int, num_tokens: int = LARGE) -> Demand:
    pictures = tuple(Picture(item, num_tokens * (i + 1), num_tokens) for i, item in enumerate(items))
    total = num_tokens * len(items)
    return replace(
        PROMPT,
        num_prompt_tokens=total + 10,
        num_media=len(items),
        media_tokens=total,
        pictures=pictures,
        chain=tuple(range(total // 16)),
    )


ENCODERS = st.lists(
    st.tuples(st.integers(0, 2000), st.integers(0, 2), st.sets(st.integers(0, 5))), min_size=1, max_size=5
)
PICTURES = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 900)), min_size=1, max_size=8)


@settings(max_examples=50)
@given(ENCODERS, PICTURES)
def test_each_picture_is_with_one_encoder_and_costs_what_it_must(
    encoders: list[tuple[int, int, set[int]]], pictures: list[tuple[int, int]]
) -> None:
    fleet = with_caches(
        [replica(f"v{i}", "vision", waiting) for i, (waiting, _, _) in enumerate(encoders)],
        {f"v{i}": held for i, (_, _, held) in enumerate(encoders)},
    )
    candidates = [
        Candidate(member, place, 0.0005 * member.now.waiting_tokens, 1 + place / 4)
        for member, (_, place, _) in zip(fleet, encoders, strict=True)
    ]
    wanted = [(Picture(item, 0, size), fleet.holders.of(item)) for item, size in pictures]
    shares = shared(candidates, wanted)
    assert sorted(i for share in shares for i in share.pictures) == list(range(len(wanted)))
    for share in shares:
        now, bit = share.candidate.member.now, share.candidate.member.bit
        missing = {p.item: p for p, holders in (wanted[i] for i in reversed(share.pictures)) if not holders & bit}
        assert share.num_tokens == sum(p.num_tokens for p in missing.values())
        work_s = encode_s(now, len(missing), share.num_tokens) + (share.candidate.begin_s if missing else 0)
        assert share.wait_s == pytest.approx(work_s)
        assert share.wait_s <= share.cost_s + 1e-9


@settings(max_examples=50)
@given(st.lists(st.integers(0, 900), min_size=2, max_size=4), st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_pictures_are_shared_only_where_the_first_token_comes_sooner(waiting: list[int], items: list[int]) -> None:
    cluster = [replica(f"v{i}", "vision", tokens) for i, tokens in enumerate(waiting)]
    fleet = with_caches([*cluster, P0, D0], {"v0": [1, 2], "v1": [2, 3, 4]})
    path = path_of(showing(*items), fleet)
    alone = min(
        path_of(showing(*items), with_caches([v, P0, D0], {v.replica_id: held})).ttft_s
        for v, held in zip(cluster, ([1, 2], [2, 3, 4], [], []), strict=False)
    )
    assert sorted(i for share in path.encoders for i in share.media) == list(range(len(items)))
    assert len(path.encoders) == 1 or path.ttft_s < alone * 1.5 + 0.01  # away from home costs less than it takes
    encoders = {share.encoder for share in path.encoders}
    assert {p.replica_id for p in path.promises} == encoders | {"p0", "d0"}


def shares_of(path: Path) -> dict[str, tuple[int, ...]]:
    return {share.encoder: share.media for share in path.encoders}


def test_what_each_encoder_holds_is_fetched_from_it() -> None:
    path = path_of(showing(1, 2, 3), with_caches([V0, V1, P0, D0], {"v0": [1, 3], "v1": [2]}))
    assert shares_of(path) == {"v0": (0, 2), "v1": (1,)}
    assert [p.media_tokens for p in path.promises[:2]] == [0, 0]
    assert path.kinds[:2] == (("vision", "cached"), ("vision", "cached"))


def test_even_where_others_wait() -> None:
    busy = replace(V1, waiting_tokens=900)
    path = path_of(showing(1, 2), with_caches([V0, busy, P0, D0], {"v0": [1], "v1": [2]}))
    assert shares_of(path) == {"v0": (0,), "v1": (1,)}


def test_many_pictures_that_nobody_knows_are_spread() -> None:
    path = path_of(showing(*range(100, 108)), Fleet.of([V0, V1, P0, D0]))
    assert sorted(len(media) for media in shares_of(path).values()) == [3, 5]  # one is at home
    assert path.ttft_s < path_of(showing(*range(100, 108)), Fleet.of([V0, P0, D0])).ttft_s


def test_small_pictures_stay_together() -> None:
    fast = [replace(v, rates=replace(v.rates, picture_s=0.001)) for v in (V0, V1)]
    path = path_of(showing(100, 101, num_tokens=1), Fleet.of([*fast, P0, D0]))
    assert [share.media for share in path.encoders] == [(0, 1)]


def test_the_same_picture_twice_is_with_one() -> None:
    path = path_of(showing(100, 100, 100), Fleet.of([V0, V1, P0, D0]))
    assert len(path.encoders) == 1


def test_pictures_that_are_covered_have_an_encoder_all_the_same() -> None:
    demand = showing(1, 2, 3)
    fleet = with_caches([V0, V1, P0, D0], {"v0": [2], "v1": [3], "p0": demand.chain[: -(-LARGE // 16)]})
    path = path_of(demand, fleet)
    assert sorted(path.encoders, key=lambda s: s.media) == [EncoderShare("v0", (0, 1)), EncoderShare("v1", (2,))]
