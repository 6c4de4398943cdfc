"""One request to an OpenAI-compatible server, and the record of what came of it. Asks once: a refusal is a result here."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import httpx

from ernie_cluster.bench.reading import Reading
from ernie_cluster.bench.record import Record

PATH = "/v1/chat/completions"
NO_STREAM = "not a chat completion"
"""Kind of error: the server's answer is in another shape."""
TIMED_OUT = "timeout"
NO_CONNECTION = "connection"


async def ask(
    client: httpx.AsyncClient,
    url: str,
    scenario: str,
    body: Mapping[str, Any],
    timeout_s: float,
    due_s: float | None = None,
) -> Record:
    """Ask, and read to the end. Never raises for what the server or the network does.

    Args:
        client: keeps the connections, and shows the key.
        url: of the server, without `/v1`.
        scenario: under which it counts.
        timeout_s: an answer that takes longer is given up.
        due_s: when it was to be sent, on the clock of `time.perf_counter`; None = now.
    """
    now_s = time.perf_counter()
    start_s = now_s if due_s is None else due_s
    began_s = time.time() - (now_s - start_s)
    reading, error, detail = Reading(), "", ""
    try:
        async with (
            asyncio.timeout(timeout_s),
            client.stream("POST", url + PATH, json=dict(body), timeout=None) as response,
        ):
            if response.status_code == 200:
                async for line in response.aiter_lines():
                    reading.feed(line, time.perf_counter())
            else:
                await response.aread()
                error, detail = f"HTTP {response.status_code}", explanation(response.text)
    except TimeoutError:
        error, detail = TIMED_OUT, f"no end within {timeout_s:g} s"
    except httpx.HTTPError as e:
        error, detail = NO_CONNECTION, f"{type(e).__name__}: {e}"
    except (ValueError, LookupError, TypeError, AttributeError) as e:
        error, detail = NO_STREAM, repr(e)[:300]
    return concluded(reading, scenario, start_s, began_s, error, detail)


def concluded(reading: Reading, scenario: str, start_s: float, began_s: float, error: str, detail: str) -> Record:
    """The record of a request that has ended just now: by itself, or with an error."""
    record = reading.record(scenario, start_s=start_s, end_s=time.perf_counter(), began_s=began_s)
    return replace(record, error=error, detail=detail) if error and not reading.error else record


def explanation(text: str) -> str:
    """What the body of an error response says."""
    try:
        return str(json.loads(text)["error"]["message"])[:300]
    except (ValueError, LookupError, TypeError):
        return text[:300]
