"""One streamed answer as a careful client reads it: it waits out refusals, and takes nothing for an answer that is none."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import httpx

from ernie_cluster.bench.reading import Reading
from ernie_cluster.chaos.prompts import Prompt

PATH = "/v1/chat/completions"
_MAX_PAUSE_S = 2.0
_BROKEN_PAUSE_S = 0.2


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client is left with."""

    text: str
    finish_reason: str | None


@dataclass(slots=True)
class Outcome:
    """What became of one request."""

    prompt: str
    began_s: float
    """Monotonic, like all times here."""
    ended_s: float = 0.0
    answer: Answer | None = None
    """None where it did not end as an answer does."""
    trouble: str = ""
    """Why it did not."""
    kind: Literal["whole", "lost", "hung"] = "lost"
    first_s: float | None = None
    """When its first piece of text came."""
    longest_gap_s: float = 0.0
    """Between two pieces of text."""
    num_refused: int = 0
    """Refusals that were waited out: the server was full, or not whole."""
    num_broken: int = 0
    """Connections that broke, after which the request was sent again; only an API process that dies may do this."""

    @property
    def total_s(self) -> float:
        return self.ended_s - self.began_s


async def ask(
    client: httpx.AsyncClient, url: str, prompt: Prompt, deadline_s: float, headers: Mapping[str, str] | None = None
) -> Outcome:
    """Ask until there is an answer, or an end that is none.

    Args:
        client: keeps the connections.
        url: of the server.
        deadline_s: seconds; without an end by then it counts as hung.
        headers: that show a key.
    """
    outcome = Outcome(prompt.name, time.monotonic())
    try:
        async with asyncio.timeout(deadline_s):
            while not await _try(client, url, prompt, outcome, dict(headers or {})):
                pass
    except TimeoutError:
        outcome.kind, outcome.trouble = "hung", f"no end within {deadline_s:g} s"
    outcome.ended_s = time.monotonic()
    return outcome


async def _try(client: httpx.AsyncClient, url: str, prompt: Prompt, outcome: Outcome, headers: dict[str, str]) -> bool:
    """One request; whether that was the end."""
    reading = Reading()
    try:
        async with client.stream("POST", url + PATH, json=prompt.body, headers=headers, timeout=None) as response:
            if response.status_code in (429, 503):
                outcome.num_refused += 1
                await response.aread()
                pause_s = _number(response.headers.get("retry-after"))
                await asyncio.sleep(min(_MAX_PAUSE_S, pause_s))
                return False
            if response.status_code != 200:
                outcome.trouble = (
                    f"HTTP {response.status_code}: {(await response.aread())[:200].decode(errors='replace')}"
                )
                return True
            async for line in response.aiter_lines():
                reading.feed(line, time.monotonic())
    except httpx.TransportError as e:
        if reading.error or reading.is_done:
            return _conclude(reading, outcome)
        outcome.num_broken += 1
        outcome.trouble = f"the connection broke: {type(e).__name__}"
        await asyncio.sleep(_BROKEN_PAUSE_S)
        return False
    except (ValueError, LookupError, TypeError, AttributeError) as e:
        outcome.trouble = f"the stream is none of chat completions: {e!r}"
        return True
    return _conclude(reading, outcome)


def _conclude(reading: Reading, outcome: Outcome) -> bool:
    if reading.times_s:
        outcome.first_s = reading.times_s[0]
        outcome.longest_gap_s = max(
            (b - a for a, b in zip(reading.times_s, reading.times_s[1:], strict=False)), default=0.0
        )
    if reading.error:
        outcome.trouble = f"the stream ended with an error: {reading.error}"
    elif not reading.is_whole or reading.finish_reason is None:
        outcome.trouble = f"the stream ended silently after {len(reading.text)} characters"
    else:
        outcome.kind, outcome.trouble = "whole", ""
        outcome.answer = Answer(reading.text, reading.finish_reason)
    return True


def _number(text: str | None) -> float:
    try:
        return max(0.05, float(text or ""))
    except ValueError:
        return 1.0
