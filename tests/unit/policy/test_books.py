"""`Books` as a state machine beside a model of its own, then its four endings of a promise one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ernie_cluster.deltas import Delta, DeltaLog
from ernie_cluster.policy.books import Books
from ernie_cluster.policy.snapshot import Promise, ReplicaSnapshot

HEARTBEAT_S = 2.0

DECODE = ReplicaSnapshot(
    replica_id="decode-0",
    model="m",
    role="decode",
    node_id="node-0",
    incarnation="a",
    is_ready=True,
    is_draining=False,
    num_running=1,
    num_waiting=0,
    waiting_tokens=0,
    free_blocks=10,
    total_blocks=20,
    block_size=16,
)
PREFILL = replace(DECODE, replica_id="prefill-0", role="prefill")


def books(*snapshots: ReplicaSnapshot, now_s: float = 0.0) -> Books:
    made = Books(HEARTBEAT_S)
    for snapshot in snapshots:
        made.report(snapshot, now_s)
    return made


def test_promises_raise_the_load_of_their_replica_alone() -> None:
    made = books(PREFILL, DECODE)
    made.promise("r1", [Promise("decode-0", blocks=3), Promise("prefill-0", tokens=40)], deadline_s=9)
    made.promise("r2", [Promise("decode-0", blocks=4, tokens=5, media_tokens=6)], deadline_s=9)
    assert made.view(1.5) == (
        replace(DECODE, free_blocks=3, num_waiting=2, waiting_tokens=11, age_s=1.5),
        replace(PREFILL, num_waiting=1, waiting_tokens=40, age_s=1.5),
    )


def test_a_promise_ends_when_released() -> None:
    made = books(DECODE)
    made.promise("r1", [Promise("decode-0", blocks=3)], deadline_s=9)
    made.release("r1")
    made.release("r1")
    assert made.view(0) == (DECODE,)


@pytest.mark.parametrize(("now_s", "free_blocks"), [(1.0, 7), (1.5, 10)])
def test_a_promise_ends_after_its_deadline(now_s: float, free_blocks: int) -> None:
    made = books(DECODE)
    made.promise("r1", [Promise("decode-0", blocks=3)], deadline_s=1.0)
    assert made.view(now_s)[0].free_blocks == free_blocks


@pytest.mark.parametrize(
    ("age_s", "free_blocks", "why"),
    [(0.0, 7, "taken after the confirmation: shows the lease itself"), (0.6, 4, "taken before: does not show it")],
)
def test_a_confirmed_promise_ends_with_a_later_snapshot(age_s: float, free_blocks: int, why: str) -> None:
    made = books(DECODE)
    made.promise("r1", [Promise("decode-0", blocks=3)], deadline_s=9)
    made.confirm("r1", "decode-0", now_s=0.5)
    made.report(replace(DECODE, free_blocks=7, age_s=age_s), now_s=1.0)
    assert made.view(1.0)[0].free_blocks == free_blocks, why


def test_an_unconfirmed_promise_outlives_snapshots() -> None:
    made = books(DECODE)
    made.promise("r1", [Promise("decode-0", blocks=3)], deadline_s=9)
    made.confirm("r1", "another", now_s=0.5)
    made.report(DECODE, now_s=1.0)
    assert made.view(1.0)[0].free_blocks == 7


def test_a_promise_ends_when_its_replica_restarts() -> None:
    made = books(DECODE)
    made.promise("r1", [Promise("decode-0", blocks=3)], deadline_s=9)
    made.report(replace(DECODE, incarnation="b"), now_s=1.0)
    assert made.view(1.0)[0].free_blocks == 10
    assert made.num_promises == 0


def test_a_promise_survives_a_replica_that_was_silent_for_a_while() -> None:
    made = books(DECODE)
    made.promise("r1", [Promise("decode-0", blocks=3)], deadline_s=9)
    assert made.view(HEARTBEAT_S + 0.1) == ()
    made.report(DECODE, now_s=3.0)
    assert made.view(3.0)[0].free_blocks == 7


def test_replicas_not_heard_of_are_forgotten() -> None:
    made = books(PREFILL, DECODE)
    made.report(DECODE, now_s=1.0)
    assert [r.replica_id for r in made.view(HEARTBEAT_S)] == ["decode-0", "prefill-0"]
    assert [r.replica_id for r in made.view(HEARTBEAT_S + 0.5)] == ["decode-0"]
    made.forget("decode-0")
    assert made.view(HEARTBEAT_S + 0.5) == ()


def test_a_late_old_snapshot_changes_nothing() -> None:
    made = books(replace(DECODE, free_blocks=5), now_s=1.0)
    made.report(replace(DECODE, free_blocks=10, age_s=0.5), now_s=1.0)
    assert made.view(1.0)[0].free_blocks == 5


def test_a_key_is_booked_once() -> None:
    made = books(DECODE)
    made.promise("r1", [Promise("decode-0")], deadline_s=9)
    with pytest.raises(AssertionError, match="'r1' is booked already"):
        made.promise("r1", [Promise("decode-0")], deadline_s=9)


def test_check_finds_an_impossible_snapshot() -> None:
    with pytest.raises(AssertionError, match="21 of 20 free"):
        books(replace(DECODE, free_blocks=21)).check()


def depth(made: Books, chain: list[int], replica_id: str = "decode-0", now_s: float = 0.0) -> int:
    """How many leading links of a chain a replica is thought to hold."""
    fleet = made.fleet(now_s)
    member = fleet.member(replica_id)
    return 0 if member is None else fleet.holders.trail(chain).depth(member.slot)


def test_caches_are_known_from_what_replicas_tell() -> None:
    made, log = books(DECODE), DeltaLog()
    for item in (1, 2, 3):
        log.add(item)
    assert made.seen("decode-0") is None
    made.cached("decode-0", log.since(None))
    assert (made.seen("decode-0"), depth(made, [1, 2, 3, 4])) == (3, 3)
    log.remove(3)
    made.cached("decode-0", log.since(made.seen("decode-0")))
    assert (made.seen("decode-0"), depth(made, [1, 2, 3, 4])) == (4, 2)


FORGET_S = 5 * HEARTBEAT_S


def test_who_is_silent_is_suspected_long_before_it_is_forgotten() -> None:
    """With its cache and its promises; its next snapshot clears it."""
    made = Books(HEARTBEAT_S, FORGET_S)
    for snapshot in (PREFILL, DECODE):
        made.report(snapshot, now_s=0.0)
    made.cached("decode-0", Delta(None, 7, b"\1" + bytes(7)))
    made.report(PREFILL, now_s=1.0)
    assert made.suspects(HEARTBEAT_S) == set()
    assert made.suspects(HEARTBEAT_S + 0.1) == {"decode-0"}
    made.check()
    assert len(made.view(HEARTBEAT_S + 0.1)) == 2
    made.report(DECODE, now_s=FORGET_S - 0.1)
    assert made.suspects(FORGET_S - 0.1) == {"prefill-0"}
    assert made.seen("decode-0") == 7
    assert [s.replica_id for s in made.view(FORGET_S + 1.1)] == ["decode-0"]
    assert made.suspects(FORGET_S + 1.1) == set()
    made.check()


def test_who_could_not_be_reached_is_suspected_until_it_tells_something() -> None:
    made = books(PREFILL, DECODE)
    made.suspect("decode-0")
    made.suspect("nobody")
    assert made.suspects(0.1) == {"decode-0"}
    made.check()
    made.report(DECODE, now_s=0.2)
    assert made.suspects(0.2) == set()
    made.suspect("decode-0")
    made.forget("decode-0")
    assert made.suspects(0.3) == set()
    made.check()


def test_a_delta_that_does_not_go_on_from_here_changes_nothing() -> None:
    made = books(DECODE)
    made.cached("decode-0", Delta(base=3, version=4, added=b"\1" + bytes(7)))
    assert (made.seen("decode-0"), depth(made, [1])) == (None, 0)


@pytest.mark.parametrize("how", ["forgotten", "restarted", "silent"])
def test_the_cache_of_a_replica_that_is_gone_is_gone(how: str) -> None:
    made = books(DECODE)
    made.cached("decode-0", Delta(None, 7, b"\1" + bytes(7)))
    if how == "forgotten":
        made.forget("decode-0")
    made.report(replace(DECODE, incarnation="b" if how == "restarted" else "a"), now_s=HEARTBEAT_S)
    if how == "silent":
        made.view(2 * HEARTBEAT_S + 0.1)
        made.report(DECODE, now_s=3 * HEARTBEAT_S)
    assert (made.seen("decode-0"), depth(made, [1], now_s=HEARTBEAT_S if how != "silent" else 3 * HEARTBEAT_S)) == (
        None,
        0,
    )
    made.check()


def test_what_a_replica_is_about_to_hold_counts_until_the_request_is_over() -> None:
    made = books(DECODE)
    made.promise("r1", [Promise("decode-0", blocks=3, items=(1, 2))], deadline_s=9)
    made.promise("r2", [Promise("decode-0", blocks=3, items=(1, 2, 3))], deadline_s=9)
    made.confirm("r1", "decode-0", now_s=0.5)
    made.report(DECODE, now_s=1.0)  # shows the lease, not yet the blocks
    assert depth(made, [1, 2, 3], now_s=1.0) == 3
    made.release("r2")
    assert depth(made, [1, 2, 3], now_s=1.0) == 2
    made.forget("decode-0")
    made.report(DECODE, now_s=1.5)
    assert depth(made, [1, 2, 3], now_s=1.5) == 2
    made.report(replace(DECODE, incarnation="b"), now_s=1.6)
    assert depth(made, [1, 2, 3], now_s=1.6) == 0
    made.release("r1")
    made.check()


class BooksMachine(RuleBasedStateMachine):
    """One replica that leases what it confirms; the books must never show more room than it will have."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.books = Books(HEARTBEAT_S, FORGET_S)
        self.asked: dict[str, int] = {}  # promised, not yet leased by the replica
        self.leased: dict[str, int] = {}
        self.count = 0
        self.snapshot()

    @rule(seconds=st.sampled_from([0.01, 0.1, 0.5]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @rule()
    def snapshot(self) -> None:
        self.books.report(replace(DECODE, free_blocks=20 - sum(self.leased.values())), self.now_s)

    @rule(blocks=st.integers(1, 8))
    def ask(self, blocks: int) -> None:
        view = self.books.view(self.now_s)
        if view and view[0].free_blocks >= blocks:
            self.count += 1
            key = f"r{self.count}"
            promise = Promise("decode-0", blocks=blocks, items=tuple(range(blocks)))
            self.books.promise(key, [promise], deadline_s=1e9)
            self.asked[key] = blocks

    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        if self.asked:
            key = data.draw(st.sampled_from(sorted(self.asked)))
            self.leased[key] = self.asked.pop(key)
            self.books.confirm(key, "decode-0", self.now_s)

    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        if self.asked:
            key = data.draw(st.sampled_from(sorted(self.asked)))
            del self.asked[key]
            self.books.release(key)

    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        if self.leased:
            key = data.draw(st.sampled_from(sorted(self.leased)))
            del self.leased[key]
            self.books.release(key)

    @rule()
    def lose_contact(self) -> None:
        self.books.forget("decode-0")

    @rule()
    def suspect(self) -> None:
        self.books.suspect("decode-0")

    @invariant()
    def never_promises_more_than_there_is(self) -> None:
        assert sum(self.asked.values()) + sum(self.leased.values()) <= 20

    @invariant()
    def books_are_in_order(self) -> None:
        self.books.check()
        for replica in self.books.view(self.now_s):
            assert 0 <= replica.free_blocks <= 20
            assert replica.age_s <= FORGET_S
            assert replica.age_s <= HEARTBEAT_S or replica.replica_id in self.books.suspects(self.now_s)


TestBooks = BooksMachine.TestCase
TestBooks.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
