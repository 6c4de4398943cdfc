"""When answers begin and end: what is learned from those that came, and who is refused for it. Laws, then tables."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ernie_cluster.policy.books import Books
from ernie_cluster.policy.fleet import Fleet
from ernie_cluster.policy.forecast import Correction, Forecasts, Outlook, batch_of, too_late
from ernie_cluster.policy.routing import Path, choose_path
from ernie_cluster.policy.snapshot import Demand, Rates, ReplicaSnapshot
from tests.unit.policy.test_routing import CLUSTERS, D0, DEMANDS, LIMITS, M0, P0, PICTURE, TEXT, V0

SECONDS = st.floats(0, 1e3, allow_nan=False)
BUSY = Rates(chunk_s=0.1, token_s=0.001, step_s=0.1, sequence_s=0.0)


@given(st.lists(st.tuples(SECONDS, SECONDS), max_size=30), SECONDS)
@example([(9.0, 28.0), (0.0, 0.0), (6.0, 0.0)], 0.0)
@settings(max_examples=50)
def test_what_is_likely_is_never_less_than_nothing(seen: list[tuple[float, float]], foretold_s: float) -> None:
    correction = Correction()
    for foretold, measured in seen:
        correction.note(foretold, measured)
    assert 0 <= correction.of(foretold_s) < 1e6


@given(st.floats(0.0, 0.5), st.floats(0.3, 3.0), st.lists(st.floats(0.005, 2.0), min_size=2, max_size=4, unique=True))
@settings(max_examples=50)
def test_a_correction_finds_what_is_always_so(fixed_s: float, slope: float, sizes: list[float]) -> None:
    correction = Correction()
    for _ in range(60):
        for foretold_s in sizes:
            correction.note(foretold_s, fixed_s + slope * foretold_s)
    for foretold_s in sizes:
        assert correction.of(foretold_s) == pytest.approx(fixed_s + slope * foretold_s, rel=0.25)


def test_nothing_seen_changes_nothing_and_short_times_say_little_of_long_ones() -> None:
    correction = Correction()
    assert correction.of(0.5) == 0.5
    for _ in range(50):
        correction.note(0.02, 0.03)
    assert correction.of(0.02) == pytest.approx(0.03, rel=0.02)
    assert correction.of(5.0) == pytest.approx(5.0, rel=0.05)


def test_long_prompts_that_take_more_than_in_proportion_are_learned_too() -> None:
    correction = Correction()
    sizes = (0.02, 0.05, 0.1, 0.3, 0.8)
    for _ in range(60):
        for foretold_s in sizes:
            correction.note(foretold_s, 0.01 + foretold_s + 2 * foretold_s**2)
    for foretold_s in sizes:
        assert correction.of(foretold_s) == pytest.approx(0.01 + foretold_s + 2 * foretold_s**2, rel=0.1)


def test_one_that_was_disturbed_spoils_little_and_is_soon_forgotten() -> None:
    correction = Correction()
    for _ in range(50):
        correction.note(0.1, 0.12)
    correction.note(0.1, 60.0)
    assert 0.12 < correction.of(0.1) < 0.15
    for _ in range(60):
        correction.note(0.1, 0.12)
    assert correction.of(0.1) == pytest.approx(0.12, rel=0.05)


# ---- outlooks


def look(forecasts: Forecasts, cluster: Iterable[ReplicaSnapshot], max_tokens: int = 11) -> tuple[Path, Outlook, Fleet]:
    demand, fleet = replace(TEXT, max_tokens=max_tokens), Fleet.of(cluster)
    path = choose_path(demand, fleet, LIMITS)
    assert isinstance(path, Path)
    return path, forecasts.outlook(demand, path, fleet), fleet


def test_the_end_is_the_prompt_then_the_turn_then_the_answer() -> None:
    forecasts = Forecasts(LIMITS)
    prefill = replace(P0, rates=BUSY)
    free = replace(D0, rates=BUSY, num_running=3, max_running=4)
    path, outlook, _ = look(forecasts, [prefill, free])
    assert outlook.ttft_s == path.ttft_s == pytest.approx(0.1 + 100 * 0.001)
    assert outlook.end_s == pytest.approx(0.2 + 10 * 0.1)
    full = replace(free, num_running=8)  # five wait with us, and four places are given back every 11 steps
    assert batch_of(full) == (4, 5)
    assert look(forecasts, [prefill, full])[1].end_s == pytest.approx(0.2 + 5 / 4 * 11 * 0.1 + 10 * 0.1)


def test_a_queue_shrinks_while_nothing_is_heard_of_it() -> None:
    books = Books(heartbeat_timeout_s=60)
    waiting = replace(P0, waiting_tokens=400, rates=BUSY)
    for told in (waiting, D0):
        books.report(replace(told, age_s=0.1), now_s=10.0)
    assert books.worked_off_s("p0", 10.2) == pytest.approx(0.3)
    assert books.worked_off_s("p0", 12.0) == pytest.approx(0.4)
    assert books.worked_off_s("d0", 12.0) == 0
    path = choose_path(TEXT, books.fleet(10.2), LIMITS)
    assert isinstance(path, Path)
    outlook = Forecasts(LIMITS).outlook(TEXT, path, books.fleet(10.2), books.worked_off_s("p0", 10.2))
    assert outlook.ttft_s == pytest.approx(path.ttft_s - 0.3)


def test_who_does_all_by_himself_begins_when_there_is_a_place() -> None:
    mixed = replace(M0, rates=BUSY, num_running=8, max_running=4)
    _, outlook, _ = look(Forecasts(LIMITS), [mixed])
    assert outlook.ttft_s == pytest.approx(0.2 + 5 / 4 * 11 * 0.1)
    assert outlook.end_s == pytest.approx(outlook.ttft_s + 10 * 0.1)


def test_what_came_corrects_what_is_foretold_of_the_same_kind_only() -> None:
    forecasts = Forecasts(LIMITS)
    cluster = [P0, D0]
    for i in range(30):
        _, outlook, _ = look(forecasts, cluster)
        forecasts.keep(f"r{i}", outlook, 0.0, 60.0)
        forecasts.learn(f"r{i}", outlook.first_s + 0.02, 2 * outlook.token_s, 11, 1.0)
    path, outlook, _ = look(forecasts, cluster)
    assert outlook.ttft_s == pytest.approx(path.ttft_s + 0.02, rel=0.05)
    assert outlook.end_s - outlook.ttft_s == pytest.approx(20 * outlook.token_s, rel=0.1)
    fleet = Fleet.of([*cluster, V0])
    seen = choose_path(PICTURE, fleet, LIMITS)
    assert isinstance(seen, Path)
    assert forecasts.outlook(PICTURE, seen, fleet).ttft_s == seen.ttft_s


def test_an_attempt_teaches_once_and_only_with_a_first_token() -> None:
    forecasts = Forecasts(LIMITS)
    path, outlook, _ = look(forecasts, [P0, D0])
    forecasts.learn("unknown", 9.0, 9.0, 9, 10.0)
    forecasts.keep("r", outlook, 0.0, 60.0)
    forecasts.learn("r", None, None, 0, 50.0)
    forecasts.learn("r", 9.0, 9.0, 9, 60.0)
    assert look(forecasts, [P0, D0])[1].ttft_s == path.ttft_s


def test_who_ran_out_of_time_teaches_that_it_takes_longer() -> None:
    forecasts = Forecasts(LIMITS)
    _, outlook, _ = look(forecasts, [P0, D0])
    for i in range(20):
        forecasts.keep(str(i), outlook, 0.0, 8.0)
        forecasts.learn(str(i), None, None, 0, 8.0)
    assert look(forecasts, [P0, D0])[1].ttft_s > 4.0


def test_who_ran_out_of_time_while_he_wrote_teaches_that_the_rest_takes_longer() -> None:
    forecasts = Forecasts(LIMITS)
    _, before, _ = look(forecasts, [P0, D0])
    for i in range(20):
        forecasts.keep(str(i), before, 0.0, 8.0)
        forecasts.learn(str(i), before.first_s, None, 1, 8.0)
    _, after, _ = look(forecasts, [P0, D0])
    assert after.ttft_s == pytest.approx(before.ttft_s, rel=0.05)
    assert after.end_s > 4.0


def test_what_batch_work_waited_says_nothing_of_interactive_work() -> None:
    forecasts, fleet = Forecasts(LIMITS), Fleet.of([P0, D0])
    path, outlook, _ = look(forecasts, [P0, D0])
    batch = forecasts.outlook(replace(TEXT, priority=1), path, fleet)
    assert batch.ttft_s == outlook.ttft_s
    forecasts.keep("r", batch, 0.0, 60.0)
    forecasts.learn("r", 9.0, None, 1, 10.0)
    assert look(forecasts, [P0, D0])[1].ttft_s == outlook.ttft_s
    assert forecasts.outlook(replace(TEXT, priority=1), path, fleet).ttft_s > outlook.ttft_s


def test_the_newest_tells_until_it_is_over_or_should_be() -> None:
    forecasts = Forecasts(LIMITS)
    _, outlook, _ = look(forecasts, [P0, D0])
    assert not forecasts.is_tried(outlook, 0.0)
    for key in ("first", "second"):
        forecasts.keep(key, outlook, 0.0, 8.0)
    forecasts.learn("first", 1.0, None, 1, 1.0)
    assert forecasts.is_tried(outlook, 7.9)
    assert not forecasts.is_tried(outlook, 8.0)
    assert not forecasts.is_tried(replace(outlook, kind="another"), 7.9)
    forecasts.learn("second", 1.0, None, 1, 1.0)
    assert not forecasts.is_tried(outlook, 1.0)


# ---- who is too late


@pytest.mark.parametrize(("left_s", "is_refused"), [(1.7, True), (1.9, False), (-1.0, True)])
def test_who_would_not_be_finished_in_time_is_told_when_that_may_be_otherwise(left_s: float, is_refused: bool) -> None:
    path, outlook, fleet = look(Forecasts(LIMITS), [replace(P0, rates=BUSY), replace(D0, rates=BUSY, num_running=1)])
    found = too_late(TEXT, path, outlook, fleet, left_s, LIMITS)
    assert (found is not None) == is_refused
    if found is not None:
        assert found.is_late
        assert found.retry_after_s == pytest.approx(max(LIMITS.retry_after_s, outlook.end_s * 1.5 - left_s))


def test_batch_work_needs_more_time_to_be_let_in() -> None:
    path, outlook, fleet = look(Forecasts(LIMITS), [replace(P0, rates=BUSY), replace(D0, rates=BUSY, num_running=1)])
    batch = replace(TEXT, priority=1)
    assert too_late(TEXT, path, outlook, fleet, 2 * outlook.end_s, LIMITS) is None
    assert too_late(batch, path, outlook, fleet, 2 * outlook.end_s, LIMITS) is not None
    assert too_late(batch, path, outlook, fleet, 4 * outlook.end_s, LIMITS) is None


def test_where_nobody_would_tell_the_books_alone_decide() -> None:
    path, outlook, fleet = look(Forecasts(LIMITS), [replace(P0, rates=BUSY), replace(D0, rates=BUSY, num_running=1)])
    feared = replace(outlook, end_s=100.0)
    assert too_late(TEXT, path, feared, fleet, 2 * outlook.end_s, LIMITS) is not None
    assert too_late(TEXT, path, feared, fleet, 2 * outlook.end_s, LIMITS, is_tried=False) is None
    assert too_late(TEXT, path, feared, fleet, 1.4 * outlook.end_s, LIMITS, is_tried=False) is not None


def test_replicas_at_rest_take_everybody() -> None:
    path, outlook, fleet = look(Forecasts(LIMITS), [replace(P0, rates=BUSY), replace(D0, rates=BUSY)])
    assert too_late(TEXT, path, outlook, fleet, 0.001, LIMITS) is None


@given(CLUSTERS, DEMANDS)
@settings(max_examples=50)
def test_every_path_has_an_outlook(cluster: list[ReplicaSnapshot], demand: Demand) -> None:
    fleet = Fleet.of(cluster)
    path = choose_path(demand, fleet, LIMITS)
    if isinstance(path, Path):
        outlook = Forecasts(LIMITS).outlook(demand, path, fleet)
        assert path.ttft_s <= outlook.ttft_s <= outlook.end_s
