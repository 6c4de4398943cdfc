"""Log-probabilities as clients see them: of the tokens whose text is shown as content, and of no others."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_cluster.api.answer import ChoiceText
from ernie_cluster.api.logprobs import ShownToken, ShownTokens
from ernie_cluster.api.markup import AnswerParser, Markup
from ernie_cluster.api.stops import StopStringFilter
from ernie_cluster.errors import ReplicaError
from ernie_cluster.request import FinishReason, SamplingParams, TokenEvent, TokenLogprobs
from tests.fakes import EOS, ByteDetokenizer, FakeBackend, FakeProcessor, bytes_of, say
from tests.unit.api.client import Server, events_of
from tests.unit.api.test_tools import ANSWER, THINK, TOOLS

pytestmark = pytest.mark.timeout(180)

PROCESSOR = FakeProcessor()
MARKUPS = [Markup(), Markup("maybe", has_tools=True), Markup("open", has_tools=True)]
PARTS = [
    "a",
    "🙂",
    "\n",
    "</think>",
    "<think>",
    "<response>",
    "</response>",
    "<tool_call>",
    '{"name": "f", "arguments": ',
]
PARTS += ['{"x": 1}', "}", "</tool_call>", "b", "é", "<"]


def run(text: str, stops: list[str], markup: Markup, sizes: list[int]) -> tuple[str, list[ShownToken]]:
    """Content of an answer, and the tokens behind it; token i has log-probability -i."""
    sampling = SamplingParams(max_tokens=10_000, num_logprobs=0)
    request = PROCESSOR.completion("p", request_id="r-0", sampling=sampling, timeout_s=1.0)
    parser = AnswerParser(markup, StopStringFilter(stops))
    choice = ChoiceText(0, request, ByteDetokenizer(), parser, ShownTokens(PROCESSOR.token_bytes))
    ids, index, content = (*bytes_of(text), EOS), 0, ""
    tokens: list[ShownToken] = []
    for size in [*sizes, len(ids)]:
        end = min(index + size, len(ids))
        reason = FinishReason.STOP if end == len(ids) else None
        logprobs = tuple(TokenLogprobs(-float(i), ()) for i in range(index, end))
        delta = choice.push(TokenEvent("r-0", index, ids[index:end], reason, logprobs=logprobs))
        content, index = content + delta.pieces.content, end
        assert delta.tokens is not None
        tokens += delta.tokens
        if choice.finish_reason is not None:
            break
    return content, tokens


@given(
    st.lists(st.sampled_from(PARTS), max_size=16).map("".join),
    st.sampled_from([[], ["b"], ["a\n", "🙂b"]]),
    st.sampled_from(MARKUPS),
    st.lists(st.integers(1, 9)),
)
def test_the_tokens_spell_the_content_and_stand_where_they_say(
    text: str, stops: list[str], markup: Markup, sizes: list[int]
) -> None:
    content, tokens = run(text, stops, markup, sizes)
    assert b"".join(t.token for t in tokens).decode() == content
    assert (content, tokens) == run(text, stops, markup, [])
    starts = [i for i, character in enumerate(content) for _ in character.encode()]
    assert [t.offset for t in tokens] == starts
    positions = [-int(t.logprob) for t in tokens]
    assert positions == sorted(set(positions))
    assert bytes(text.encode()[i] for i in positions).decode() == content


def test_a_token_that_reaches_beyond_the_content_is_listed_once() -> None:
    class Words(ByteDetokenizer):
        def push(self, ids: Any) -> str:
            return "".join(WORDS[i] for i in ids)

    WORDS = ["why", "</think>\nyes", ", no", "w STOP", "never"]
    sampling = SamplingParams(max_tokens=10, num_logprobs=0)
    request = PROCESSOR.completion("p", request_id="r-0", sampling=sampling, timeout_s=1.0)
    parser = AnswerParser(Markup("open"), StopStringFilter([" STOP"]))
    choice = ChoiceText(0, request, Words(), parser, ShownTokens(lambda i: WORDS[i].encode()))
    logprobs = tuple(TokenLogprobs(-float(i), ()) for i in range(5))
    delta = choice.push(TokenEvent("r-0", 0, (0, 1, 2, 3, 4), FinishReason.LENGTH, logprobs=logprobs))
    assert delta.pieces.content == "yes, now"
    assert [(t.token.decode(), t.offset) for t in delta.tokens or ()] == [
        ("</think>\nyes", 0),
        (", no", 3),
        ("w STOP", 7),
    ]


def test_a_backend_that_forgets_them_is_noticed() -> None:
    sampling = SamplingParams(max_tokens=10, num_logprobs=0)
    request = PROCESSOR.completion("p", request_id="r-0", sampling=sampling, timeout_s=1.0)
    parser = AnswerParser(Markup(), StopStringFilter([]))
    choice = ChoiceText(0, request, ByteDetokenizer(), parser, ShownTokens(PROCESSOR.token_bytes))
    with pytest.raises(ReplicaError, match="1 tokens came with 0 log-probabilities"):
        choice.push(TokenEvent("r-0", 0, (97,)))


# The routes


def entry(token: str, logprob: float, token_bytes: list[int]) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": token_bytes}


@pytest.mark.anyio
async def test_chat() -> None:
    response = await Server(FakeBackend(say("aé"))).chat(logprobs=True, top_logprobs=2)
    assert response.json()["choices"][0]["logprobs"] == {
        "content": [
            entry("a", -0.5, [97]) | {"top_logprobs": [entry("a", -0.5, [97]), entry("b", -1.5, [98])]},
            entry("\ufffd", -0.5, [195])
            | {"top_logprobs": [entry("\ufffd", -0.5, [195]), entry("\ufffd", -1.5, [196])]},
            entry("\ufffd", -0.5, [169])
            | {"top_logprobs": [entry("\ufffd", -0.5, [169]), entry("\ufffd", -1.5, [170])]},
        ],
        "refusal": None,
    }


@pytest.mark.anyio
async def test_completion() -> None:
    response = await Server(FakeBackend(say("aé!"))).complete(logprobs=1)
    assert response.json()["choices"][0]["logprobs"] == {
        "tokens": ["a", "bytes:\\xc3", "bytes:\\xa9", "!"],
        "token_logprobs": [-0.5] * 4,
        "top_logprobs": [{"a": -0.5}, {"bytes:\\xc3": -0.5}, {"bytes:\\xa9": -0.5}, {"!": -0.5}],
        "text_offset": [0, 1, 1, 2],
    }


@pytest.mark.anyio
@pytest.mark.parametrize(("count", "expected"), [(0, {"a": -0.5}), (2, {"a": -0.5, "b": -1.5})])
async def test_a_completion_always_names_the_chosen_token(count: int, expected: dict[str, float]) -> None:
    response = await Server(FakeBackend(say("a"))).complete(logprobs=count)
    assert response.json()["choices"][0]["logprobs"]["top_logprobs"] == [expected]


@pytest.mark.anyio
async def test_streams_add_up_to_the_whole() -> None:
    fields = {"tools": TOOLS, **THINK, "logprobs": True, "top_logprobs": 1}
    whole = (await Server(FakeBackend(say(ANSWER, 3))).chat(**fields)).json()["choices"][0]["logprobs"]
    assert "".join(t["token"] for t in whole["content"]) == "Let me look."
    events = events_of((await Server(FakeBackend(say(ANSWER, 3))).chat(**fields, stream=True)).text)
    choices = [event["choices"][0] for event in events if event != "[DONE]"]
    assert [t for c in choices for t in (c["logprobs"] or {"content": []})["content"]] == whole["content"]
    for choice in choices:
        shown = "".join(t["token"] for t in (choice["logprobs"] or {"content": []})["content"])
        assert shown == choice["delta"].get("content", "")


@pytest.mark.anyio
async def test_completion_streams_count_offsets_on() -> None:
    events = events_of((await Server(FakeBackend(say("abc"))).complete(logprobs=0, stream=True)).text)
    parts = [e["choices"][0]["logprobs"] for e in events if e != "[DONE]"]
    assert [offset for part in parts for offset in part["text_offset"]] == [0, 1, 2]


@pytest.mark.anyio
@pytest.mark.parametrize("fields", [{}, {"logprobs": None}, {"logprobs": False, "top_logprobs": 0}])
async def test_nobody_asks_nobody_gets(fields: dict[str, Any]) -> None:
    server = Server()
    response = await server.chat(**fields)
    assert response.json()["choices"][0]["logprobs"] is None
    assert server.backend.requests[0].sampling.num_logprobs is None


@pytest.mark.anyio
async def test_content_without_tokens_is_an_empty_list() -> None:
    answer = await Server(FakeBackend(say("hmm"))).chat(**THINK, logprobs=True)
    assert answer.json()["choices"][0]["logprobs"] == {"content": [], "refusal": None}
    assert json.loads(answer.text)["choices"][0]["message"]["content"] == ""
