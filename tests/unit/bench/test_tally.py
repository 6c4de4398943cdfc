"""What is counted as what, and that parts of a run add up to it."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_cluster.bench.record import Record, Slo
from ernie_cluster.bench.tally import Book, Tally, merged

WHOLE = Record(
    "chat",
    100.0,
    2.0,
    ttft_s=0.5,
    gaps_s=(0.5, 1.0),
    num_tokens=16,
    num_prompt_tokens=7,
    num_cached_tokens=4,
)
FAILED = replace(WHOLE, error="HTTP 429", num_tokens=0, ttft_s=None, gaps_s=())
SLO = Slo(ttft_s=1.0, tpot_s=0.1)


@st.composite
def records(draw: st.DrawFn) -> Record:
    times = sorted(draw(st.lists(st.floats(0.001, 50), max_size=6)))
    return Record(
        draw(st.sampled_from(["chat", "long"])),
        draw(st.floats(0, 5)),
        (times[-1] if times else 0.0) + draw(st.floats(0.001, 1)),
        ttft_s=times[0] if times else None,
        gaps_s=tuple(b - a for a, b in itertools.pairwise(times)),
        num_tokens=draw(st.integers(0, 9)),
        error=draw(st.sampled_from(["", "", "HTTP 503", "timeout"])),
    )


def book_of(found: list[Record]) -> Book:
    book = Book()
    for record in found:
        book.add(record, SLO)
    return book


@settings(max_examples=50)
@given(st.lists(st.lists(records(), max_size=6), max_size=4))
def test_books_of_parts_add_up_to_the_book_of_all(parts: list[list[Record]]) -> None:
    whole = book_of([record for part in parts for record in part])
    found = Book()
    for part in reversed(parts):
        found.merge(Book.from_json(json.loads(json.dumps(book_of(part).to_json()))))
    assert found == whole


@settings(max_examples=50)
@given(st.lists(records(), max_size=12))
def test_scenarios_and_seconds_are_two_ways_to_cut_the_same(found: list[Record]) -> None:
    book = book_of(found)
    assert merged(book.seconds.values()) == book.total
    total = book.total
    assert total.num_requests == len(found) == total.num_whole + total.num_errors
    assert total.num_good <= total.num_whole == len(total.latency)
    assert total.num_tokens == sum(record.num_tokens for record in found)


@settings(max_examples=50)
@given(st.lists(records(), max_size=12), st.floats(0.001, 5))
def test_a_stricter_slo_never_finds_more_good_answers(found: list[Record], ttft_s: float) -> None:
    stricter = (Slo(None, None), Slo(ttft_s, None), Slo(ttft_s, 0.05), Slo(ttft_s / 2, 0.05, 1.0))
    counts = [sum(slo.is_met(record) for record in found) for slo in stricter]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == sum(record.is_whole for record in found)


def test_time_per_token_leaves_the_first_token_out() -> None:
    assert WHOLE.tpot_s == pytest.approx(1.5 / 15)
    assert replace(WHOLE, num_tokens=1).tpot_s is None


@pytest.mark.parametrize(
    ("slo", "is_met"),
    [
        (Slo(0.5, 0.1, 2.0), True),
        (Slo(0.499, None), False),
        (Slo(None, 0.099), False),
        (Slo(None, None, 1.9), False),
        (Slo(None, None), True),
    ],
)
def test_an_answer_at_its_target_is_good(slo: Slo, is_met: bool) -> None:
    assert slo.is_met(WHOLE) is is_met


def test_errors_count_by_kind_and_leave_no_duration() -> None:
    tally = Tally()
    for record in (WHOLE, FAILED, FAILED):
        tally.add(record, SLO)
    assert (tally.num_requests, tally.num_whole, dict(tally.errors)) == (3, 1, {"HTTP 429": 2})
    assert (len(tally.ttft), len(tally.itl), len(tally.latency)) == (1, 2, 1)
