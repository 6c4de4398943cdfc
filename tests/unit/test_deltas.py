"""A copy that is kept by differences is the set itself, whenever and however much is asked for."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_cluster.deltas import Delta, DeltaLog, short_hash
from ernie_cluster.policy.holders import Holders

STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["add", "remove"]), st.integers(0, 6)),
        st.just(("tell", 0)),
    ),
    max_size=40,
)


@settings(max_examples=50)
@given(STEPS, st.integers(1, 8), st.integers(1, 4))
def test_a_copy_follows_its_original(steps: list[tuple[str, int]], max_changes: int, max_per_delta: int) -> None:
    log, copy, holders, seen, truth = DeltaLog(max_changes, max_per_delta), set[int](), Holders(), None, set[int]()
    for verb, item in [*steps, *[("tell", 0)] * (len(steps) + 1)]:
        if verb == "add":
            log.add(item)
            truth.add(item)
        elif verb == "remove":
            log.remove(item)
            truth.discard(item)
        else:
            delta = log.since(seen)
            assert not set(delta.added_items) & set(delta.removed_items)
            if delta.base is None:
                copy = set(delta.added_items)
            else:
                assert delta.base == seen
                assert len(delta.added_items) + len(delta.removed_items) <= max_per_delta
                copy = (copy | set(delta.added_items)) - set(delta.removed_items)
            holders.apply(3, delta)
            seen = delta.version
    assert copy == set(log) == truth
    assert {item for item in range(7) if holders.of(item)} == truth
    assert log.since(seen).is_empty
    holders.check()


def test_a_reader_that_fell_behind_gets_the_whole_set() -> None:
    log = DeltaLog(max_changes=2)
    for item in (5, 6, 7):
        log.add(item)
    assert log.since(0) == Delta(None, 3, log.since(None).added)
    assert sorted(log.since(0).added_items) == [5, 6, 7]
    assert log.since(1).added_items == [6, 7]
    assert log.since(99).base is None  # of another life


def test_a_short_hash_is_its_first_eight_bytes() -> None:
    assert short_hash(b"\x01" + bytes(7) + b"\xff" * 24) == 1
    assert short_hash(b"\xff" * 32) == 2**64 - 1


CHAINS = st.lists(st.integers(0, 5), max_size=8)


@settings(max_examples=50)
@given(st.lists(CHAINS, max_size=5), CHAINS, st.integers(0, 31), st.integers(1, 4))
def test_levels_are_the_longest_common_beginnings(
    held: list[list[int]], asked: list[int], among: int, limit: int
) -> None:
    """Each link of a chain stands for all before it, so the first links of two chains are equal or nothing is."""

    def links(chain: list[int]) -> list[int]:
        return [hash(tuple(chain[: i + 1])) & 0xFFFFFFFF for i in range(len(chain))]

    def common(a: list[int], b: list[int]) -> int:
        return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

    holders, log = Holders(), DeltaLog()
    for slot, chain in enumerate(held):
        log = DeltaLog()
        for link in links(chain):
            log.add(link)
        holders.apply(slot, log.since(None))
    depths = {slot: common(chain, asked) for slot, chain in enumerate(held) if among >> slot & 1}
    wanted = [
        (d, sum(1 << s for s in depths if depths[s] == d)) for d in sorted({*depths.values()} - {0}, reverse=True)
    ]
    holders.expect(9, links(asked))
    assert list(holders.trail(links(asked)).levels(among, limit)) == wanted[:limit]
    assert holders.trail(links(asked)).present(among | 1 << 9) == (wanted[0] if wanted else (0, 0))
    assert all(holders.trail(links(asked)).depth(slot) == depth for slot, depth in depths.items())


def test_what_is_expected_twice_is_expected_until_both_are_over() -> None:
    holders = Holders()
    holders.expect(0, [1, 2])
    holders.expect(0, [2])
    holders.unexpect(0, [1, 2])
    assert (holders.of(1), holders.of(2)) == (0, 1)
    holders.apply(0, Delta(None, 1, (1).to_bytes(8, "little")))
    holders.unexpect(0, [2])
    assert (holders.of(1), holders.of(2)) == (1, 0)
    holders.check()


@pytest.mark.parametrize("item", [0, 2**64 - 1])
def test_the_ends_of_the_range_are_items_too(item: int) -> None:
    log = DeltaLog()
    log.add(item)
    assert log.since(0).added_items == [item]
    log.remove(item)
    assert log.since(1).removed_items == [item]
