"""Who waits, in which order, and for how long. Laws over random crowds, then examples."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_cluster.config.router import RouterConfig
from ernie_cluster.deltas import DeltaLog
from ernie_cluster.policy.fleet import Fleet
from ernie_cluster.policy.snapshot import Demand, Rates
from ernie_cluster.policy.waiting import Held, Ticket, WaitingRoom, drain_s, patience_s, work_of
from tests.unit.policy.test_routing import M0, P0, P1, V0

LIMITS = RouterConfig(reserve_output_tokens=32, max_waiting=100, max_wait_s=30, interactive_wait_s=0)


def ticket(key: str, tenant: str = "a", tokens: int = 100, now_s: float = 0.0, **demand: int | float) -> Ticket:
    wanted = replace(Demand("m", tokens, 1, priority=1, tenant=tenant), **demand)  # type: ignore[arg-type]
    return Ticket.of(key, wanted, frozenset(), LIMITS, now_s)


def serve(room: WaitingRoom, model: str = "m") -> str | None:
    first = room.first(model)
    if first is None:
        return None
    room.leave(first.key)
    room.charge(first.demand)
    return first.key


CROWDS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 500), st.integers(1, 3)), max_size=30)


@settings(max_examples=50)
@given(CROWDS)
def test_everybody_has_a_turn_and_more_urgent_ones_first(crowd: list[tuple[str, int, int]]) -> None:
    room, urgency = WaitingRoom(LIMITS), dict[str, int]()
    for i, (tenant, tokens, priority) in enumerate(crowd):
        assert room.enter(ticket(str(i), tenant, tokens, priority=priority))
        urgency[str(i)] = priority
    served = [key for _ in crowd if (key := serve(room)) is not None]
    assert sorted(served) == sorted(urgency)
    assert [urgency[key] for key in served] == sorted(urgency.values())
    assert len(room) == 0
    assert serve(room) is None


@settings(max_examples=50)
@given(st.lists(st.integers(1, 500), min_size=12, max_size=12), st.lists(st.integers(1, 500), min_size=12, max_size=12))
def test_tenants_get_equal_shares_while_both_wait(one: list[int], other: list[int]) -> None:
    room, given_to = WaitingRoom(LIMITS), {"a": 0, "b": 0}
    waiting = {"a": len(one), "b": len(other)}
    work = dict[str, int]()
    for tenant, sizes in (("a", one), ("b", other)):
        for i, tokens in enumerate(sizes):
            made = ticket(f"{tenant}{i}", tenant, tokens)
            work[made.key] = work_of(made.demand, LIMITS)
            room.enter(made)
    while all(waiting.values()):
        key = serve(room)
        assert key is not None
        given_to[key[0]] += work[key]
        waiting[key[0]] -= 1
        assert abs(given_to["a"] - given_to["b"]) <= max(work.values())


def test_pictures_and_answers_count_as_well_as_prompts() -> None:
    assert work_of(Demand("m", 100, 50, 1, 60), LIMITS) == 100 + 60 + 32


def test_a_tenant_that_comes_late_does_not_make_up_for_it() -> None:
    room = WaitingRoom(LIMITS)
    for i in range(4):
        room.enter(ticket(f"a{i}", "a"))
    assert [serve(room), serve(room)] == ["a0", "a1"]
    for i in range(3):
        room.enter(ticket(f"b{i}", "b"))
    assert [serve(room) for _ in range(5)] == ["a2", "b0", "a3", "b1", "b2"]


def test_of_one_tenant_the_nearest_deadline_comes_first() -> None:
    room = WaitingRoom(LIMITS)
    room.enter(ticket("late", timeout_s=60.0))
    room.enter(ticket("soon", timeout_s=40.0))
    room.enter(ticket("same", timeout_s=40.0))
    assert [serve(room) for _ in range(3)] == ["soon", "same", "late"]


def test_nobody_is_overtaken_by_one_who_comes_later() -> None:
    room = WaitingRoom(LIMITS)
    room.enter(ticket("large", tokens=10_000))
    assert room.is_behind(ticket("small", tokens=1, now_s=1.0))
    assert not room.is_behind(ticket("urgent", now_s=1.0, priority=0))
    other = ticket("other", now_s=1.0)
    assert not room.is_behind(replace(other, demand=replace(other.demand, model="another")))
    assert room.work_before(ticket("small", now_s=1.0)) == 10_001


def test_the_room_has_an_end() -> None:
    room = WaitingRoom(replace(LIMITS, max_waiting=1))
    assert room.enter(ticket("1"))
    assert not room.enter(ticket("2"))
    room.leave("2")
    room.leave("1")
    assert room.enter(ticket("2"))


@pytest.mark.parametrize(
    ("priority", "timeout_s", "patience"), [(1, 600.0, 30.0), (1, 20.0, 20.0), (0, 600.0, 0.0), (-5, 600.0, 0.0)]
)
def test_batch_work_waits_and_interactive_work_does_not(priority: int, timeout_s: float, patience: float) -> None:
    demand = Demand("m", 1, 1, priority=priority, timeout_s=timeout_s)
    assert patience_s(demand, LIMITS) == patience


def test_waiting_has_an_end() -> None:
    room = WaitingRoom(LIMITS)
    room.enter(ticket("1"))
    room.enter(ticket("2", now_s=5.0))
    assert room.expired(29.9) == []
    assert [t.key for t in room.expired(30.0)] == ["1"]


def test_work_is_done_by_all_who_read_prompts() -> None:
    slow = replace(P1, rates=Rates(token_s=0.001))
    assert drain_s(Fleet.of([V0, P0, slow, M0]), "m", 11_000) == pytest.approx(1.0)  # 5,000 + 1,000 + 5,000 a second
    assert drain_s(Fleet.of([V0]), "m", 11_000) == 0


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 20_000), st.floats(0.1, 20.0)), max_size=12), st.integers(0, 20_000))
def test_who_goes_could_not_make_it_and_who_stays_can(prompts: list[tuple[int, float]], queued: int) -> None:
    """At 0.2 ms a token, one after the other in the order of their turns, behind what is queued."""
    fleet, room = Fleet.of([replace(P0, waiting_tokens=queued)]), WaitingRoom(LIMITS)
    for i, (tokens, timeout_s) in enumerate(prompts):
        room.enter(ticket(str(i), tokens=tokens, timeout_s=timeout_s))
    gone = room.hopeless(fleet, 0.0)
    for late in gone:
        room.leave(late.key)
    assert room.hopeless(fleet, 0.0) == []
    before = queued
    while (first := room.first("m")) is not None:
        before += first.demand.num_prompt_tokens
        assert 0.01 + before * 0.0002 <= first.deadline_s + 1e-6
        room.leave(first.key)


@pytest.mark.parametrize(
    ("tokens", "timeout_s", "waiting_tokens", "is_hopeless"),
    [
        (10_000, 2.1, 0, False),  # 2 s and a chunk
        (10_000, 2.0, 0, True),
        (10_000, 2.1, 1000, True),
        (100, 0.1, 0, False),
    ],
)
def test_a_deadline_is_held_against_the_queue_and_the_prompt(
    tokens: int, timeout_s: float, waiting_tokens: int, is_hopeless: bool
) -> None:
    room = WaitingRoom(LIMITS)
    room.enter(ticket("r", tokens=tokens, timeout_s=timeout_s))
    fleet = Fleet.of([replace(P0, waiting_tokens=waiting_tokens), replace(P1, waiting_tokens=10**6)])
    assert bool(room.hopeless(fleet, 0.0)) == is_hopeless
    assert room.hopeless(Fleet.of([V0]), 0.0) == []  # nobody knows yet


def test_what_is_cached_need_not_be_read() -> None:
    room, fleet, log = WaitingRoom(LIMITS), Fleet.of([P0]), DeltaLog()
    room.enter(ticket("r", tokens=10_000, chain=tuple(range(1, 625)), timeout_s=0.1))  # type: ignore[arg-type]
    assert room.hopeless(fleet, 0.0)
    for item in range(1, 625):
        log.add(item)
    fleet.holders.apply(0, log.since(None))
    assert not room.hopeless(fleet, 0.0)


def test_who_waits_is_counted_by_model_with_his_pictures() -> None:
    room = WaitingRoom(LIMITS)
    for key, media in (("a", 0), ("b", 40), ("c", 2)):
        room.enter(ticket(key, num_media=int(media > 0), media_tokens=media))
    assert room.held() == {"m": Held(3, 42)}
    for key in "abc":
        room.leave(key)
    assert not room.held()


@settings(max_examples=50)
@given(
    each=st.integers(1, 5), sizes=st.lists(st.integers(1, 500), min_size=1, max_size=6), tenants=st.sampled_from("ab")
)
def test_batch_work_moves_on_whatever_else_comes(each: int, sizes: list[int], tenants: str) -> None:
    """A place becomes free at a time, and an urgent request comes for each."""
    room = WaitingRoom(replace(LIMITS, batch_turn=each))
    for i, tokens in enumerate(sizes):
        room.enter(ticket(f"batch-{i}", "b", tokens))
    served = list[bool]()
    for i in range(len(sizes) * (each + 1)):
        urgent = ticket(f"urgent-{i}", tenants, 1, priority=0, timeout_s=1.0)
        if room.is_behind(urgent):
            key = serve(room)
            assert key is not None
            served.append(key.startswith("batch"))
        else:
            room.charge(urgent.demand)
            served.append(False)
    assert served == ([False] * each + [True]) * len(sizes)


def test_batch_work_always_comes_last_where_that_is_wanted() -> None:
    room = WaitingRoom(replace(LIMITS, batch_turn=0))
    room.enter(ticket("batch"))
    for _ in range(1000):
        urgent = ticket("urgent", priority=0)
        assert not room.is_behind(urgent)
        room.charge(urgent.demand)


def test_the_turn_of_batch_work_comes_before_those_of_its_urgent_equals_and_after_the_most_urgent() -> None:
    room = WaitingRoom(replace(LIMITS, batch_turn=1))
    room.enter(ticket("late", priority=2))
    room.enter(ticket("batch", priority=1))
    room.charge(ticket("passes", priority=0).demand)
    for key, priority in (("urgent", 0), ("most urgent", -1)):
        room.enter(ticket(key, priority=priority))
    assert [serve(room) for _ in range(4)] == ["most urgent", "batch", "urgent", "late"]
