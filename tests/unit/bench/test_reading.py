"""What a stream comes to: times, tokens, and what is no answer."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from ernie_cluster.bench.asking import ask
from ernie_cluster.bench.reading import CUT, IN_STREAM, Reading
from ernie_cluster.bench.record import Record


def line(*, usage: dict[str, Any] | None = None, reason: str | None = None, **delta: Any) -> str:
    return "data: " + json.dumps({"choices": [{"delta": delta, "finish_reason": reason}], "usage": usage})


END = [line(reason="stop"), "data: " + json.dumps({"choices": [], "usage": {"completion_tokens": 9, "prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": 2}}}), "data: [DONE]"]  # fmt: skip


def read(*lines: str) -> Record:
    """Lines that come a second after one another; the request was sent at second 10, seconds count from 11."""
    reading = Reading()
    for second, one in enumerate(lines, start=11):
        reading.feed(one, float(second))
    return reading.record("chat", start_s=10.0, end_s=30.0, began_s=1000.0)


def test_times_are_those_of_pieces_of_text_and_tokens_those_of_the_server() -> None:
    record = read(line(role="assistant"), line(content="a"), ": a comment", line(content="b"), line(content="c"), *END)
    assert (record.ttft_s, record.gaps_s, record.latency_s) == (2.0, (2.0, 1.0), 20.0)
    assert (record.num_tokens, record.num_prompt_tokens, record.num_cached_tokens) == (9, 5, 2)
    assert record.is_whole
    assert (record.began_s, record.ended_s) == (1000.0, 1020.0)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "content"])
def test_thoughts_count_from_their_first_piece(key: str) -> None:
    assert read(line(**{key: "hm"}), *END).ttft_s == 1.0


def test_a_server_without_usage_has_its_pieces_counted() -> None:
    assert read(line(content="a"), line(content="b"), line(reason="stop"), "data: [DONE]").num_tokens == 2


@pytest.mark.parametrize(
    ("lines", "kind"),
    [
        ([line(content="a")], CUT),
        ([line(content="a"), "data: [DONE]"], CUT),
        ([line(content="a", reason="stop")], CUT),
        ([line(content="a"), 'data: {"error": {"message": "gone"}}', "data: [DONE]"], IN_STREAM),
        ([], CUT),
    ],
)
def test_what_does_not_end_as_an_answer_is_an_error(lines: list[str], kind: str) -> None:
    record = read(*lines)
    assert record.error == kind
    assert record.detail


def asked(reply: httpx.Response | Exception, timeout_s: float = 5.0) -> Record:
    async def answer(_: httpx.Request) -> httpx.Response:
        if isinstance(reply, Exception):
            raise reply
        if reply.status_code == 299:
            await asyncio.Event().wait()
        return reply

    async def run() -> Record:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
            return await ask(client, "http://x", "chat", {"model": "m"}, timeout_s)

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("reply", "kind", "words"),
    [
        (httpx.Response(429, json={"error": {"message": "full"}}), "HTTP 429", "full"),
        (httpx.Response(500, text="bug"), "HTTP 500", "bug"),
        (httpx.Response(200, text="data: no JSON\n\n"), "not a chat completion", "JSON"),
        (httpx.Response(200, text='data: {"choices": [{"text": "x"}]}\n\n'), "not a chat completion", "delta"),
        (httpx.Response(200, text="data: [1]\n\n"), "not a chat completion", ""),
        (httpx.Response(200, text="hello"), CUT, "0 pieces"),
        (httpx.ConnectError("refused"), "connection", "refused"),
    ],
)
def test_errors_have_kinds_and_say_what_the_server_said(reply: Any, kind: str, words: str) -> None:
    record = asked(reply)
    assert record.error == kind
    assert words in record.detail


def test_an_answer_that_never_comes_is_given_up() -> None:
    assert asked(httpx.Response(299), timeout_s=0.05).error == "timeout"
