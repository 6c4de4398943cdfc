"""From token events to text: chunking never matters, and broken streams are noticed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_cluster.api.answer import Answer, ChoiceText
from ernie_cluster.api.markup import AnswerParser, Markup
from ernie_cluster.api.prepare import Job
from ernie_cluster.api.stops import StopStringFilter
from ernie_cluster.errors import ReplicaError, ReplicaLost
from ernie_cluster.request import FinishReason, GenerationRequest, SamplingParams, TokenEvent
from tests.fakes import EOS, ByteDetokenizer, FakeBackend, FakeProcessor, Script, bytes_of, say

PROCESSOR = FakeProcessor()
PLAIN = Markup()


def request(request_id: str = "r-0", min_tokens: int = 0) -> GenerationRequest:
    sampling = SamplingParams(min_tokens=min_tokens, max_tokens=10_000)
    return PROCESSOR.completion("p", request_id=request_id, sampling=sampling, timeout_s=1.0)


def choice(stops: list[str], min_tokens: int = 0, markup: Markup = PLAIN) -> ChoiceText:
    parser = AnswerParser(markup, StopStringFilter(stops))
    return ChoiceText(0, request(min_tokens=min_tokens), ByteDetokenizer(), parser)


def job(*requests: GenerationRequest) -> Job:
    return Job("r", requests, len(requests), (), PLAIN, is_stream=True, has_usage=False, has_timeline=False)


@given(st.text("ab🙂é", max_size=20), st.lists(st.integers(1, 9)), st.sampled_from([[], ["ab"], ["🙂", "ba"]]))
def test_text_does_not_depend_on_how_events_cut_the_tokens(text: str, sizes: list[int], stops: list[str]) -> None:
    def run(sizes: list[int]) -> tuple[str, str | None]:
        ids, index, out = (*bytes_of(text), EOS), 0, choice(stops)
        shown = ""
        for size in [*sizes, len(ids)]:
            end = min(index + size, len(ids))
            reason = FinishReason.STOP if end == len(ids) else None
            shown += out.push(TokenEvent("r-0", index, ids[index:end], reason)).pieces.content
            index = end
            if out.finish_reason is not None:
                break
        return shown, out.finish_reason

    assert run(sizes) == run([])
    if not stops:
        assert run(sizes) == (text, FinishReason.STOP)


@given(st.text("a.", min_size=1, max_size=12), st.integers(0, 12))
def test_stop_strings_count_only_in_text_after_min_tokens(text: str, min_tokens: int) -> None:
    event = TokenEvent("r-0", 0, (*bytes_of(text), EOS), FinishReason.STOP)
    assert (
        choice(["."], min_tokens).push(event).pieces.content == text[:min_tokens] + text[min_tokens:].partition(".")[0]
    )


@pytest.mark.parametrize("size", [1, 3, 100])
def test_reasoning_tokens_do_not_depend_on_how_events_cut_the_tokens(size: int) -> None:
    ids, out = (*bytes_of("why</think>\nyes"), EOS), choice([], markup=Markup("open"))
    for start in range(0, len(ids), size):
        reason = FinishReason.STOP if start + size >= len(ids) else None
        out.push(TokenEvent("r-0", start, ids[start : start + size], reason))
    assert (out.num_reasoning_tokens, out.num_tokens) == (len("why</think>"), len(ids))


@pytest.mark.parametrize(
    ("reason", "shown"), [(FinishReason.STOP, "tool_calls"), (FinishReason.LENGTH, FinishReason.LENGTH)]
)
def test_an_answer_that_called_tools_says_why_it_ended(reason: FinishReason, shown: str) -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    out = choice([], markup=Markup(has_tools=True))
    assert out.push(TokenEvent("r-0", 0, bytes_of(call), reason)).finish_reason == shown


@pytest.mark.parametrize("index", [0, 2])
def test_repeated_and_missing_tokens_are_noticed(index: int) -> None:
    out = choice([])
    out.push(TokenEvent("r-0", 0, (97,)))
    with pytest.raises(ReplicaError, match=f"token {index} .* token 1 was due"):
        out.push(TokenEvent("r-0", index, (98,)))


def test_only_the_stop_token_at_the_end_is_no_text() -> None:
    event = TokenEvent("r-0", 0, (*bytes_of("ab"),), FinishReason.STOP)  # stopped by something else than a token
    assert choice([]).push(event).pieces.content == "ab"


@pytest.mark.anyio
async def test_text_before_a_failure_is_delivered_and_none_after_it() -> None:
    fail, go_on = asyncio.Event(), asyncio.Event()
    scripts: dict[int, Script] = {
        0: [*say("early", finish_reason=None), fail, ReplicaLost("gone")],
        1: [go_on, *say("late")],
    }
    backend = FakeBackend(scripts=scripts)
    async with Answer(backend, job(request("r-0"), request("r-1")), PROCESSOR) as answer:
        assert [d.pieces.content for d in await answer.take()] == ["early"]
        fail.set()
        with pytest.raises(ReplicaLost):
            await answer.take()
        go_on.set()
        with pytest.raises(ReplicaLost):
            await answer.take()
    assert backend.aborted == ["r-1"] or backend.finished == ["r-0", "r-1"]


@pytest.mark.anyio
async def test_leaving_waits_until_the_backend_has_let_go() -> None:
    class Slow(FakeBackend):
        has_let_go = False

        async def generate(self, request: GenerationRequest) -> AsyncGenerator[list[TokenEvent]]:
            try:
                yield [TokenEvent(request.request_id, 0, (97,))]
                await asyncio.Event().wait()
            finally:
                for _ in range(5):
                    await asyncio.sleep(0)
                self.has_let_go = True

    backend = Slow()
    async with Answer(backend, job(request()), PROCESSOR) as answer:
        await answer.take()
        assert not backend.has_let_go
    assert backend.has_let_go


@pytest.mark.anyio
async def test_take_says_when_all_is_over() -> None:
    backend = FakeBackend(scripts={0: say("a"), 1: say("b")})
    texts = ["", ""]
    async with Answer(backend, job(request("r-0"), request("r-1")), PROCESSOR) as answer:
        while deltas := await answer.take():
            for delta in deltas:
                texts[delta.index] += delta.pieces.content
        assert answer.is_over
        assert await answer.take() == []
    assert texts == ["a", "b"]
