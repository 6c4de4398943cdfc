"""Laws of putting the news of several replicas into the order of the answer, and whom to blame for a failure."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_cluster.actors.merge import AttemptFailed, Cast, Failure, News, merge
from ernie_cluster.actors.messages import EncodeReport
from ernie_cluster.errors import DeadlineExceeded, EngineFailed, Evicted, PeerSilent, ReplicaLost, TransferFailed
from ernie_cluster.request import FinishReason, Span, TokenEvent

CAST = Cast("prefill-0", "decode-0")


def lost(replica_id: str) -> Failure:
    return Failure(replica_id, ReplicaLost(f"{replica_id} is gone"), is_told=False)


LOST = lost("decode-0")


def events_of(lengths: Sequence[int], first: int) -> list[TokenEvent]:
    """Events of these lengths from index `first` on; tokens are their own indices; the last one is the end."""
    events, index = [], first
    for i, length in enumerate(lengths):
        reason = FinishReason.LENGTH if i + 1 == len(lengths) else None
        spans = (Span(f"stage {i}", float(-i), 1.0),) if i % 2 else ()
        events.append(TokenEvent("r", index, tuple(range(index, index + length)), reason, i, spans))
        index += length
    return events


def collect(
    batches: Iterable[Sequence[News]], first: int, cast: Cast = CAST
) -> tuple[list[TokenEvent], Exception | None]:
    """What `merge` yields when the news come in these batches, and what it raises."""

    async def run() -> tuple[list[TokenEvent], Exception | None]:
        queue: asyncio.Queue[News] = asyncio.Queue()
        out: list[TokenEvent] = []

        async def feed() -> None:
            for batch in batches:
                for item in batch:
                    queue.put_nowait(item)
                while not queue.empty():  # noqa: ASYNC110  until the reader has had its turn
                    await asyncio.sleep(0)

        feeding = asyncio.create_task(feed())
        try:
            async for events in merge(queue, first, [Span("route", 5.0, 1.0)], 30, cast):
                assert events, "an empty list says nothing"
                out += events
        except (AttemptFailed, DeadlineExceeded) as e:
            return out, e
        finally:
            feeding.cancel()
        return out, None

    return asyncio.run(run())


@st.composite
def deliveries(draw: st.DrawFn) -> tuple[list[TokenEvent], list[list[News]], int]:
    """Events of an answer in order; the same in any order, with reports between, in batches; the first index."""
    first = draw(st.integers(0, 3))
    events = events_of(draw(st.lists(st.integers(1, 3), min_size=1, max_size=8)), first)
    reports = [EncodeReport((Span("encode", 1.0, 1.0),))] * draw(st.integers(0, 2))
    news: list[News] = list(draw(st.permutations([*events, *reports])))
    cuts = sorted(draw(st.lists(st.integers(0, len(news)), max_size=3)))
    edges = [0, *cuts, len(news)]
    return events, [news[a:b] for a, b in pairwise(edges)], first


@given(deliveries())
def test_any_order_of_arrival_gives_the_same_answer(delivery: tuple[list[TokenEvent], list[list[News]], int]) -> None:
    events, batches, first = delivery
    out, error = collect(batches, first)
    assert error is None
    assert [(e.index, e.token_ids, e.finish_reason) for e in out] == [
        (e.index, e.token_ids, e.finish_reason) for e in events
    ]
    assert all(e.spans == () for e in out[:-1]), "the journey goes out with the last event"
    starts = [s.start_s for s in out[-1].spans]
    assert starts == sorted(starts)
    assert {s.name for s in out[-1].spans} >= {"route", *(s.name for e in events for s in e.spans)}
    assert out[-1].num_cached_tokens == max(e.num_cached_tokens for e in events)


@given(deliveries(), st.data())
def test_failure_comes_after_all_that_is_complete_before_it(
    delivery: tuple[list[TokenEvent], list[list[News]], int], data: st.DataObject
) -> None:
    events, batches, first = delivery
    news = [item for batch in batches for item in batch]
    seen = news[: data.draw(st.integers(0, len(news)))]
    out, error = collect([[*seen, LOST, *news[len(seen) :]][: len(seen) + 1]], first)
    complete = []
    for event in events:
        if event not in seen:
            break
        complete.append(event.index)
    assert [e.index for e in out] == complete
    if len(complete) == len(events):
        assert error is None, "a finished answer cannot fail any more"
    else:
        assert isinstance(error, AttemptFailed)
        assert error.failure is LOST


@given(deliveries(), st.sampled_from(["vision-0", "prefill-0", "decode-0"]), st.booleans(), st.data())
def test_whose_part_is_over_may_fail(
    delivery: tuple[list[TokenEvent], list[list[News]], int], who: str, is_mixed: bool, data: st.DataObject
) -> None:
    """With each failure, in whatever order, the answer is whole or ends with a failure; it is whole where only those fail
    whose part was over by then."""
    events, batches, first = delivery
    failure, at = lost(who), data.draw(st.integers(0, len(batches)))
    cast = Cast("prefill-0", None) if is_mixed else CAST
    out, error = collect([*batches[:at], [failure], *batches[at:]], first, cast)
    told = [e for batch in batches[:at] for e in batch if isinstance(e, TokenEvent)]
    has_first = any(e.index == first for e in told)
    is_handed_over = has_first and any(e.index + len(e.token_ids) >= first + 2 for e in told)
    is_over = {
        "vision-0": has_first, "prefill-0": is_handed_over and not is_mixed, "decode-0": is_mixed and has_first
    }[who]  # fmt: skip
    if is_over or len(told) == len(events):
        assert error is None
        assert [e.token_ids for e in out] == [e.token_ids for e in events]
    else:
        assert isinstance(error, AttemptFailed)
        assert error.failure is failure


@pytest.mark.parametrize(
    ("replica_id", "num_given", "num_heard", "is_over"),
    [
        ("vision-0", 0, 0, False),
        ("vision-0", 0, 3, False),  # the token that was made from its pictures may never come
        ("vision-0", 1, 1, True),
        ("prefill-0", 1, 1, False),  # the decode replica may have nothing yet
        ("prefill-0", 0, 2, False),  # its token is lost with it
        ("prefill-0", 1, 2, True),
        ("decode-0", 1, 2, False),
        ("decode-0", 9, 9, False),
    ],
)
def test_when_a_part_is_over(replica_id: str, num_given: int, num_heard: int, is_over: bool) -> None:
    assert CAST.is_over(replica_id, num_given, num_heard) == is_over


def test_who_answers_alone_is_never_over() -> None:
    assert not Cast("mixed-0", None).is_over("mixed-0", 9, 9)


def test_first_failure_is_the_one_that_is_told() -> None:
    second = Failure("prefill-0", TransferFailed("and so it broke off"), is_told=True)
    _, error = collect([[LOST, second]], 0)
    assert isinstance(error, AttemptFailed)
    assert error.failure is LOST


@pytest.mark.parametrize("num_turns", range(5))
def test_who_is_cancelled_as_news_come_is_cancelled(num_turns: int) -> None:
    """Else the answer to a client who has left goes on to its end."""

    async def run() -> bool:
        queue: asyncio.Queue[News] = asyncio.Queue()

        async def read() -> None:
            async for _ in merge(queue, 0, [], 60.0, CAST):
                pass

        task = asyncio.create_task(read())
        await asyncio.sleep(0)
        queue.put_nowait(TokenEvent("r", 0, (1,)))
        for _ in range(num_turns):  # of the loop, at any of which the cancellation may come
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task}, timeout=0.2)
        is_cancelled = task.cancelled()
        task.cancel()
        return is_cancelled

    assert asyncio.run(run())


def test_silence_ends_at_the_deadline() -> None:
    async def run() -> None:
        async for _ in merge(asyncio.Queue(), 0, [], 0.0, CAST):
            pytest.fail("nothing was there")

    with pytest.raises(DeadlineExceeded):
        asyncio.run(run())


@pytest.mark.parametrize(
    ("failure", "culprit"),
    [
        (LOST, "decode-0"),
        (Failure("prefill-0", EngineFailed("it stopped"), is_told=True), "prefill-0"),
        (Failure("prefill-0", ReplicaLost("no channel"), is_told=True), "decode-0"),
        (Failure("prefill-0", PeerSilent("no reply"), is_told=True), "decode-0"),
        (Failure("vision-0", ReplicaLost("no channel"), is_told=True), "prefill-0"),
        (Failure("vision-1", ReplicaLost("no channel"), is_told=True), "prefill-0"),
        (Failure("decode-0", ReplicaLost("it knows nobody further on"), is_told=True), None),
        (Failure("decode-0", Evicted("no blocks"), is_told=True), None),
        (Failure("prefill-0", TransferFailed("checksum"), is_told=True), None),
    ],
)
def test_culprit(failure: Failure, culprit: str | None) -> None:
    links = {"vision-0": "prefill-0", "vision-1": "prefill-0", "prefill-0": "decode-0"}
    assert failure.culprit(links) == culprit
