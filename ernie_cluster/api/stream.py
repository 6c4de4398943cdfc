"""Writes an answer to the client: as server-sent events while it comes, or in one piece."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ernie_cluster.api.answer import Answer, Delta
from ernie_cluster.api.markup import Pieces
from ernie_cluster.api.openai import DONE, Form, Heading, chunk, encode, sse, timeline_of, trailer, usage_of, whole
from ernie_cluster.api.prepare import Job
from ernie_cluster.api.traffic import Meter
from ernie_cluster.api.wire import Wire
from ernie_cluster.request import Span

MAX_FLUSH_INTERVAL_S = 0.05
"""Longer gaps would be seen as stutter."""
FLUSH_COST_S = 0.001
"""What one write of one stream costs between its API replica and the client, proxy included, on one core.
Source: measured, 1.07 ms through Ray Serve 2.60's Python proxy on a 2-core machine."""


def flush_interval_s(num_streams: int) -> float:
    """Least time between two writes of one stream, after its first.

    A write costs the same whatever it holds, so with N streams each may write every N x 1 ms and the core is just
    busy. 1 stream: 1 ms; 20 streams: 20 ms; from 50 streams on: 50 ms.
    """
    return min(MAX_FLUSH_INTERVAL_S, FLUSH_COST_S * max(0, num_streams))


@dataclass(frozen=True, slots=True)
class Presentation:
    """How a job's answer is to look."""

    form: Form
    heading: Heading
    job: Job
    own_spans: Sequence[Span]
    """Stages that the API itself went through."""

    def usage(self, answer: Answer) -> dict[str, Any]:
        """OpenAI's token counts."""
        return usage_of(
            self.job.num_prompt_tokens, answer.num_tokens, answer.num_cached_tokens, answer.num_reasoning_tokens
        )

    def timeline(self, answer: Answer) -> list[dict[str, Any]] | None:
        """The stages of the journey, if they were asked for."""
        return timeline_of(self.own_spans, answer.choices) if self.job.has_timeline else None

    def chunks(self, deltas: Sequence[Delta], begun: set[int]) -> list[bytes]:
        """One event per choice that has something to show; `begun` are the choices that have had their first."""
        shown = [d for d in deltas if d.pieces or d.finish_reason or d.index not in begun]
        return [sse(chunk(self.form, self.heading, d, is_first=d.index not in begun)) for d in shown]

    def closing(self, answer: Answer) -> list[bytes]:
        """The events that end a stream."""
        usage = self.usage(answer) if self.job.has_usage else None
        timeline = self.timeline(answer)
        if usage is None and timeline is None:
            return [DONE]
        return [sse(trailer(self.form, self.heading, usage, timeline)), DONE]


async def write_whole(wire: Wire, answer: Answer, look: Presentation, meter: Meter) -> None:
    """Gather the answer and send it as one JSON object."""
    wholes = [Pieces() for _ in answer.choices]
    while deltas := await answer.take():
        meter.tokens(deltas)
        for delta in deltas:
            wholes[delta.index].add(delta.pieces)
    body = whole(look.form, look.heading, wholes, answer.choices, look.usage(answer), look.timeline(answer))
    await wire.write_whole(encode(body))


async def write_stream(
    wire: Wire, answer: Answer, look: Presentation, meter: Meter, num_streams: Callable[[], int]
) -> None:
    """Send the answer as it comes. Nothing is sent before the first news, so an early error has its own status."""
    meter.is_stream = True
    begun: set[int] = set()
    while True:
        deltas = await answer.take()
        meter.tokens(deltas)
        events = look.chunks(deltas, begun)
        begun.update(delta.index for delta in deltas)
        is_over = answer.is_over
        if is_over:
            events += look.closing(answer)
        if events:
            await wire.write_events(b"".join(events), is_last=is_over)
        if is_over:
            return
        await asyncio.sleep(flush_interval_s(num_streams()))
