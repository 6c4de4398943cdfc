"""When the requests of a run are sent: so many at a time, so many per second, or as a trace has it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

Send = Callable[[int, float | None], Coroutine[Any, Any, None]]
"""Sends request number so and so, which is due at a moment of `time.perf_counter` (None: now); ends with the answer."""


class Pace(Protocol):
    """How a part of a run goes."""

    async def run(self, send: Send, numbers: Iterator[int], until_s: float) -> None:
        """Send requests until there are none left or it is `until_s`; then wait for those that run.

        Args:
            numbers: of the requests, in order.
            until_s: on the clock of `time.perf_counter`; no request is sent from then on.
        """
        ...


@dataclass(frozen=True, slots=True)
class Closed:
    """So many clients, each asks as soon as it has its answer: the load gives way when the server is slow."""

    num_clients: int

    async def run(self, send: Send, numbers: Iterator[int], until_s: float) -> None:
        async def client() -> None:
            while time.perf_counter() < until_s and (number := next(numbers, None)) is not None:
                await send(number, None)

        async with asyncio.TaskGroup() as group:
            for _ in range(self.num_clients):
                group.create_task(client())

    def __str__(self) -> str:
        return f"{self.num_clients} at a time"


@dataclass(frozen=True, slots=True)
class Open:
    """Poisson arrivals, whatever became of those before: what many users who do not know each other do."""

    requests_per_s: float
    seed: int

    async def run(self, send: Send, numbers: Iterator[int], until_s: float) -> None:
        chance = random.Random(self.seed)
        due_s = accumulate(iter(lambda: chance.expovariate(self.requests_per_s), None))
        await _send_when_due(send, numbers, until_s, due_s)

    def __str__(self) -> str:
        return f"{self.requests_per_s:g} requests/s at random"


@dataclass(frozen=True, slots=True)
class Replay:
    """At the times of a trace: request i is its i-th, and what comes after its end is not sent."""

    times_s: Sequence[float]
    """Since its beginning, ascending."""
    speed: float = 1.0

    async def run(self, send: Send, numbers: Iterator[int], until_s: float) -> None:
        await _send_when_due(send, numbers, until_s, iter([time_s / self.speed for time_s in self.times_s]))

    def __str__(self) -> str:
        return f"a trace at {self.speed:g} times its speed"


async def _send_when_due(send: Send, numbers: Iterator[int], until_s: float, due_s: Iterator[float]) -> None:
    start_s = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for after_s, number in zip(due_s, numbers, strict=False):
            at_s = start_s + after_s
            if at_s >= until_s:
                await asyncio.sleep(until_s - time.perf_counter())
                return
            await asyncio.sleep(at_s - time.perf_counter())
            group.create_task(send(number, at_s))
