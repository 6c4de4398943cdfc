"""Who is asked what and when: paces, turns of two servers, and what they leave in the books."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import time
from collections import Counter
from xml.etree import ElementTree

import httpx
import pytest

from ernie_cluster.bench.course import plotted, windows
from ernie_cluster.bench.pace import Closed, Open, Pace, Replay
from ernie_cluster.bench.record import Record, Slo
from ernie_cluster.bench.report import Side, lines, to_json
from ernie_cluster.bench.run import Plan, Server, run
from ernie_cluster.bench.scenarios import find
from ernie_cluster.bench.sketch import Sketch
from ernie_cluster.bench.tally import Book, Tally, merged

ANSWER = "".join(
    f"data: {event}\n\n"
    for event in (
        '{"choices": [{"delta": {"content": "a"}}]}',
        '{"choices": [{"delta": {"content": "b"}, "finish_reason": "stop"}]}',
        '{"choices": [], "usage": {"completion_tokens": 2, "prompt_tokens": 3}}',
        "[DONE]",
    )
)


def driven(pace: Pace, count: int, until_s: float = math.inf) -> tuple[list[int], int, list[float]]:
    """(numbers sent, most at a time, due times since the start) of requests that take no time."""
    sent: list[int] = []
    due: list[float] = []
    running = most = 0

    async def send(number: int, due_s: float | None) -> None:
        nonlocal running, most
        sent.append(number)
        due.append(due_s or 0.0)
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1

    asyncio.run(pace.run(send, iter(range(count)), until_s))
    return sent, most, due


@pytest.mark.parametrize("num_clients", [1, 3, 50])
def test_a_closed_load_sends_each_once_and_never_more_at_a_time_than_clients(num_clients: int) -> None:
    sent, most, _ = driven(Closed(num_clients), 40)
    assert sorted(sent) == list(range(40))
    assert most == min(num_clients, 40)


def test_arrivals_at_random_are_due_at_the_rate_and_the_same_for_the_same_seed() -> None:
    sent, _, due = driven(Open(20_000.0, 7), 200)
    _, _, again = driven(Open(20_000.0, 7), 200)
    assert sent == list(range(200))
    assert [b - a for a, b in itertools.pairwise(due)] == pytest.approx(
        [b - a for a, b in itertools.pairwise(again)], abs=1e-6
    )
    assert (due[-1] - due[0]) / 199 == pytest.approx(1 / 20_000, rel=0.3)


def test_a_trace_is_played_at_its_times_and_then_over() -> None:
    sent, _, due = driven(Replay([0.0, 0.01, 0.04], speed=10.0), 99)
    assert sent == [0, 1, 2]
    assert [at - due[0] for at in due] == pytest.approx([0.0, 0.001, 0.004])


@pytest.mark.parametrize("pace", [Closed(2), Open(1000.0, 1), Replay([0.0, 1.0])])
def test_nothing_is_sent_when_the_time_is_up(pace: Pace) -> None:
    assert driven(pace, 10, until_s=time.perf_counter())[0] == []


class Farm:
    """Two servers that answer at once, and who was asked what."""

    def __init__(self, status: int = 200) -> None:
        self.asked: list[tuple[str, str]] = []
        self.status = status

    async def answer(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        self.asked.append((request.url.host, json.dumps(body["messages"])))
        return httpx.Response(self.status, text=ANSWER)

    def play(self, plan: Plan, *hosts: str) -> list[Server]:
        async def go() -> list[Server]:
            async with httpx.AsyncClient(transport=httpx.MockTransport(self.answer)) as client:
                servers = [Server(f"http://{host}", "m", client) for host in hosts]
                await run(plan, servers, lambda server, record: None)
                return servers

        return asyncio.run(go())


def plan_of(num_requests: int | None, num_rounds: int = 1, num_warm_up: int = 0, for_s: float | None = None) -> Plan:
    source = find("chat").shrunk(10)
    return Plan(source, Closed(3), Slo(), 1, num_requests, for_s, num_rounds, num_warm_up=num_warm_up)


def test_all_requests_are_counted_and_warm_up_is_not() -> None:
    farm = Farm()
    (server,) = farm.play(plan_of(10, num_warm_up=4), "a")
    tally = server.book.total
    assert (tally.num_requests, tally.num_whole, tally.num_tokens, tally.num_prompt_tokens) == (10, 10, 20, 30)
    assert len(farm.asked) == 14
    assert len(set(farm.asked)) == 14, "a question came twice, which a cache would know"


def test_two_servers_are_asked_the_same_in_turns_that_change_their_order() -> None:
    farm = Farm()
    first, second = farm.play(plan_of(10, num_rounds=4), "a", "b")
    of = {host: Counter(text for asked, text in farm.asked if asked == host) for host in "ab"}
    assert of["a"] == of["b"]
    assert first.book.total.num_requests == second.book.total.num_requests == 10
    order = [host for i, (host, _) in enumerate(farm.asked) if i == 0 or farm.asked[i - 1][0] != host]
    assert order == ["a", "b", "a", "b", "a"]


def test_a_run_by_time_goes_on_with_new_questions_in_each_round() -> None:
    farm = Farm()
    (server,) = farm.play(plan_of(None, num_rounds=2, for_s=0.06), "a")
    assert len({text for _, text in farm.asked}) == len(farm.asked) == server.book.total.num_requests > 0


def test_errors_are_kept_with_an_example() -> None:
    (server,) = Farm(status=503).play(plan_of(3), "a")
    assert dict(server.book.total.errors) == {"HTTP 503": 3}
    assert "HTTP 503" in server.examples


# what is told of it


def side(num: int, latency_s: float, error: str = "") -> Side:
    tally = Tally()
    for _ in range(num):
        tally.add(Record("chat", 0.0, latency_s, latency_s / 2, (latency_s / 2,), 11, error=error), Slo())
    return Side("http://x", "m", tally, 2.0, {error: "why"} if error else {}, Sketch())


def test_a_table_of_two_has_ratios() -> None:
    told = "\n".join(lines([side(4, 1.0), side(4, 2.0)]))
    row = next(line for line in told.splitlines() if line.startswith("E2E p50"))
    assert [float(cell.rstrip("x")) for cell in row.split()[3:]] == pytest.approx([1.0, 2.0, 0.5], rel=0.02)


def test_a_table_of_errors_says_what_they_were_and_divides_by_nothing() -> None:
    told = "\n".join(lines([side(3, 1.0, "HTTP 429"), side(0, 1.0)]))
    assert "3 x HTTP 429: why" in told
    assert "errors of this: 3" in told


def test_json_has_rates_over_the_duration_and_what_adds_up() -> None:
    told = json.loads(json.dumps(to_json(side(4, 1.0))))
    assert (told["requests_per_s"], told["output_tokens_per_s"], told["goodput_per_s"]) == (2.0, 22.0, 2.0)
    assert Tally.from_json(told["tally"]) == side(4, 1.0).tally


@pytest.mark.parametrize("ends", [[], [5.0], [5.0, 5.5], [5.0, 700.0, 2000.5]])
def test_a_course_is_drawn_whatever_happened(ends: list[float]) -> None:
    book = Book()
    for at_s in ends:
        book.add(Record("chat", at_s - 1, 1.0, 0.5, (0.1,), 5), Slo())
    width, parts = windows(book.seconds)
    assert merged(parts) == book.total
    assert len(parts) <= 240
    assert width >= 1
    assert ElementTree.fromstring(plotted(book.seconds)).tag.endswith("svg")
