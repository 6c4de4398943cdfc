"""What the API replica tells of an attempt that is over: counted and timed as the news arrive, in whatever order."""

from __future__ import annotations

import pytest

from ernie_cluster.actors.mailbox import Mailbox
from ernie_cluster.actors.merge import Failure, News
from ernie_cluster.actors.messages import EncodeReport, Ended
from ernie_cluster.errors import ReplicaLost
from ernie_cluster.request import TokenEvent

ACCEPTED, ROUTED = 100.0, 101.0


def tell(news: list[tuple[float, News]], first: int = 0, accepted_s: float | None = ACCEPTED) -> Ended:
    now = [0.0]
    mailbox = Mailbox(first, lambda: now[0])
    now[0] = ROUTED
    mailbox.routed()
    for now[0], item in news:
        mailbox.put_nowait(item)
    return mailbox.ended("a#0", accepted_s)


def tokens(index: int, count: int = 1) -> TokenEvent:
    return TokenEvent("a#0", index, (7,) * count)


@pytest.mark.parametrize("first", [0, 5])
def test_it_tells_when_tokens_came(first: int) -> None:
    news: list[tuple[float, News]] = [(102.0, tokens(first)), (103.0, tokens(first + 1, 3)), (105.0, tokens(first + 4))]
    assert tell(news, first) == Ended("a#0", ttft_s=2.0, tpot_s=0.75, output_tokens=5, path_ttft_s=1.0)


def test_the_order_between_replicas_and_what_comes_twice_change_nothing() -> None:
    early: list[tuple[float, News]] = [(102.0, tokens(1)), (103.0, tokens(0)), (104.0, tokens(2)), (109.0, tokens(2))]
    assert tell(early) == Ended("a#0", ttft_s=3.0, tpot_s=0.5, output_tokens=3, path_ttft_s=2.0)


def test_one_token_has_no_pace_and_a_second_attempt_no_ttft() -> None:
    assert tell([(102.0, tokens(0))]) == Ended("a#0", 2.0, None, 1, 1.0)
    assert tell([(102.0, tokens(0))], accepted_s=None) == Ended("a#0", None, None, 1, 1.0)


def test_without_a_first_token_there_is_nothing_to_tell() -> None:
    failure = Failure("prefill-0", ReplicaLost("gone"), is_told=False)
    assert tell([(102.0, EncodeReport(())), (103.0, tokens(1)), (104.0, failure)]) == Ended("a#0")


def test_it_is_a_queue_still() -> None:
    mailbox = Mailbox(0)
    news: list[News] = [tokens(1), EncodeReport(()), tokens(2)]
    for item in news:
        mailbox.put_nowait(item)
    assert [mailbox.get_nowait() for _ in news] == news


def test_the_first_token_tells_how_long_it_took() -> None:
    now = [ROUTED]
    mailbox = Mailbox(0, lambda: now[0])
    mailbox.routed()
    now[0] += 0.5
    for _ in range(2):
        mailbox.put_nowait(tokens(0))
    first, again = mailbox.get_nowait(), mailbox.get_nowait()
    assert isinstance(first, TokenEvent)
    assert [(s.name, s.duration_s) for s in first.spans] == [("first_token", 0.5)]
    assert again == tokens(0)
