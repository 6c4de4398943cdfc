"""How one answer is read: what counts as whole, lost and hung, and what is waited out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from ernie_cluster.chaos.prompts import Prompt, make_prompts
from ernie_cluster.chaos.stream import Answer, Outcome, ask

PROMPT = Prompt("p", {"model": "m", "stream": True})
Reply = Callable[[], httpx.Response]


def sse(*events: dict[str, Any] | str) -> httpx.Response:
    return httpx.Response(200, text="".join(f"data: {e if isinstance(e, str) else json.dumps(e)}\n\n" for e in events))


def said(text: str, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}, "finish_reason": reason}]}


def asked(*replies: httpx.Response | Exception, deadline_s: float = 30.0) -> Outcome:
    """What comes of these answers, one after another."""
    left = list(replies)

    async def answer(_: httpx.Request) -> httpx.Response:
        reply = left.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def run() -> Outcome:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
            return await ask(client, "http://x", PROMPT, deadline_s)

    return asyncio.run(run())


WHOLE = (said("Hel"), said("lo", "stop"), "[DONE]")


def test_a_whole_answer() -> None:
    outcome = asked(sse(*WHOLE))
    assert (outcome.kind, outcome.answer, outcome.trouble) == ("whole", Answer("Hello", "stop"), "")


def test_refusals_are_waited_out() -> None:
    full = [httpx.Response(status, headers={"retry-after": "0.01"}) for status in (429, 503)]
    outcome = asked(*full, sse(*WHOLE))
    assert (outcome.kind, outcome.num_refused, outcome.num_broken) == ("whole", 2, 0)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (sse(said("Hel"), {"error": {"message": "gone"}}), "gone"),
        (sse(said("Hel")), "silently after 3"),
        (sse(said("Hel"), "[DONE]"), "silently"),
        (sse("no JSON"), "none of chat completions"),
        (sse({"choices": [{"text": "x"}]}), "none of chat completions"),
        (httpx.Response(500, text="bug"), "HTTP 500"),
        (httpx.Response(400, text="bad"), "HTTP 400"),
    ],
)
def test_what_no_answer_may_end_with_is_lost(reply: httpx.Response, words: str) -> None:
    outcome = asked(reply)
    assert (outcome.kind, outcome.answer) == ("lost", None)
    assert words in outcome.trouble


def test_a_connection_that_breaks_is_made_again_and_counted() -> None:
    outcome = asked(httpx.ReadError("reset"), httpx.ConnectError("refused"), sse(*WHOLE))
    assert (outcome.kind, outcome.num_broken) == ("whole", 2)


def test_without_an_end_it_has_hung() -> None:
    async def forever() -> AsyncIterator[bytes]:
        yield b"data: " + json.dumps(said("Hel")).encode() + b"\n\n"
        await asyncio.Event().wait()

    assert asked(httpx.Response(200, content=forever()), deadline_s=0.05).kind == "hung"


@pytest.mark.parametrize("has_eyes", [True, False])
def test_the_same_seed_asks_the_same(has_eyes: bool) -> None:
    made = [make_prompts("m", seed, has_eyes=has_eyes, max_tokens=8) for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2]
    assert len({p.name for p in made[0]}) == len(made[0])
    assert {p.name.partition(",")[0] for p in made[0]} == {"greedy", "seeded", "schema"}
    assert any("image_url" in json.dumps(p.body) for p in made[0]) == has_eyes
