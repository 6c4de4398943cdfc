"""A run: the same requests to one server, or in turns to several, and what came of them."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import httpx

from ernie_cluster.bench.asking import ask
from ernie_cluster.bench.pace import Pace
from ernie_cluster.bench.record import Record, Slo
from ernie_cluster.bench.scenarios import Source
from ernie_cluster.bench.sketch import Sketch
from ernie_cluster.bench.tally import Book

WARM_UP_NUMBER = 1 << 40
"""Of the first request that does not count."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked, and how."""

    source: Source
    pace: Pace
    slo: Slo
    seed: int
    num_requests: int | None
    """To each server; None: until `duration_s`."""
    duration_s: float | None
    """For each server; what runs then is waited for."""
    num_rounds: int = 1
    """Turns of each server."""
    timeout_s: float = 300.0
    num_warm_up: int = 1
    """Requests at a time to each server that do not count."""
    is_plain: bool = False


@dataclass(slots=True)
class Server:
    """One server and what it has shown."""

    url: str
    model: str
    client: httpx.AsyncClient
    book: Book = field(default_factory=Book)
    examples: dict[str, str] = field(default_factory=dict)
    """Kind of error -> what the first one said."""
    duration_s: float = 0.0
    """Of its turns together, from the first request sent to the last answer."""
    lag: Sketch = field(default_factory=Sketch)
    """How late requests of an open load were sent."""


async def run(plan: Plan, servers: Sequence[Server], on_end: Callable[[Server, Record], None]) -> None:
    """Fill the servers' books.

    Each round goes to all servers, in an order that turns round each time, so that neither always comes first; a round
    asks all of them the same.

    Args:
        on_end: called with each request that has ended.
    """
    for server in servers:
        await _warm_up(plan, server)
    first = 0
    for number in range(plan.num_rounds):
        share = None if plan.num_requests is None else _share(plan.num_requests, plan.num_rounds, number)
        order = servers if number % 2 == 0 else servers[::-1]
        nexts = [await _turn(plan, server, first, share, on_end) for server in order]
        first = max(nexts) if share is None else first + share


def _share(whole: int, parts: int, number: int) -> int:
    """Sizes of nearly equal parts; 10 in 4 parts: 2, 3, 2, 3."""
    return whole * (number + 1) // parts - whole * number // parts


async def _turn(
    plan: Plan, server: Server, first: int, share: int | None, on_end: Callable[[Server, Record], None]
) -> int:
    """One server's part of a round; the number of the request after the last one that was sent."""
    last = first

    async def send(number: int, due_s: float | None) -> None:
        nonlocal last
        last = max(last, number + 1)
        scenario = plan.source.choose(plan.seed, number)
        body = await asyncio.to_thread(scenario.body, server.model, plan.seed, number, is_plain=plan.is_plain)
        if due_s is not None:
            server.lag.add(time.perf_counter() - due_s)
        record = await ask(server.client, server.url, scenario.name, body, plan.timeout_s, due_s)
        server.book.add(record, plan.slo)
        if record.error:
            server.examples.setdefault(record.error, record.detail)
        on_end(server, record)

    start_s = time.perf_counter()
    until_s = math.inf if plan.duration_s is None else start_s + plan.duration_s / plan.num_rounds
    numbers = itertools.count(first) if share is None else iter(range(first, first + share))
    try:
        await plan.pace.run(send, numbers, until_s)
    finally:
        server.duration_s += time.perf_counter() - start_s
    return last


async def _warm_up(plan: Plan, server: Server) -> None:
    async def once(number: int) -> None:
        scenario = plan.source.choose(plan.seed, number)
        body = scenario.body(server.model, plan.seed, number, is_plain=plan.is_plain)
        await ask(server.client, server.url, scenario.name, body, plan.timeout_s)

    await asyncio.gather(*(once(WARM_UP_NUMBER + i) for i in range(plan.num_warm_up)))
