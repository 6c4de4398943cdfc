"""Writes an answer to the client: while it comes, or in one piece. Knows no wire."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ernie_cluster.api.answer import Answer, Delta
from ernie_cluster.api.dialect import Presentation
from ernie_cluster.api.markup import Pieces
from ernie_cluster.api.traffic import Meter

MAX_FLUSH_INTERVAL_S = 0.05
"""Longer gaps would be seen as stutter."""
FLUSH_COST_S = 0.001
"""What one write of one stream costs between its API replica and the client, proxy included, on one core.
Source: measured, 1.07 ms through Ray Serve 2.60's Python proxy on a 2-core machine."""


class Wire(Protocol):
    """The way to one client. All verbs raise Aborted when he is gone, and SlowClient when he reads no more."""

    async def write_whole(self, answer: Any) -> None:
        """What `Presentation.whole` made."""
        ...

    async def write_events(self, events: Sequence[bytes], *, is_last: bool) -> None:
        """What `Presentation.news` and `closing` made, at least one."""
        ...

    async def keep_alive(self) -> None:
        """Show those between us and the client that the answer is still being made."""
        ...


def flush_interval_s(num_streams: int) -> float:
    """Least time between two writes of one stream, after its first.

    A write costs the same whatever it holds, so with N streams each may write every N x 1 ms and the core is just
    busy. 1 stream: 1 ms; 20 streams: 20 ms; from 50 streams on: 50 ms.
    """
    return min(MAX_FLUSH_INTERVAL_S, FLUSH_COST_S * max(0, num_streams))


async def write_whole(wire: Wire, answer: Answer, look: Presentation, meter: Meter) -> None:
    """Gather the answer and send it."""
    wholes = [Delta(choice.index, Pieces()) for choice in answer.choices]
    while deltas := await answer.take():
        meter.tokens(deltas)
        for delta in deltas:
            wholes[delta.index].add(delta)
    await wire.write_whole(look.whole(answer, wholes))


async def write_stream(
    wire: Wire,
    answer: Answer,
    look: Presentation,
    meter: Meter,
    num_streams: Callable[[], int],
    keep_alive_s: float | None,
) -> None:
    """Send the answer as it comes. Before the first news nothing is sent for `keep_alive_s`, so an early error has its own
    status."""
    meter.is_stream = True
    while True:
        deltas = await _take(wire, answer, keep_alive_s)
        meter.tokens(deltas)
        events = look.news(deltas)
        is_over = answer.is_over
        if is_over:
            events += look.closing(answer)
        if events:
            await wire.write_events(events, is_last=is_over)
        if is_over:
            return
        await asyncio.sleep(flush_interval_s(num_streams()))


async def _take(wire: Wire, answer: Answer, keep_alive_s: float | None) -> list[Delta]:
    """See `Answer.take`."""
    while True:
        try:
            async with asyncio.timeout(keep_alive_s) as silence:
                return await answer.take()
        except TimeoutError:
            if not silence.expired():
                raise
        await wire.keep_alive()
