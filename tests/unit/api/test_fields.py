"""Request fields beside the everyday ones: what each becomes in the requests that are run, and in the answer."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from ernie_cluster.api.prepare import TEXT_MAX_TOKENS
from ernie_cluster.api.unsupported import UNSUPPORTED
from ernie_cluster.request import FinishReason, GenerationRequest, MediaInput, SamplingParams, ThinkingLimit
from tests.fakes import EOS, FakeBackend, FakeProcessor, Step, bytes_of, say
from tests.unit.api.client import CHAT_URL, COMPLETION_URL, Connection, Server, events_of

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]


def sampled(server: Server) -> SamplingParams:
    return server.backend.requests[-1].sampling


def limit_of(max_tokens: int) -> ThinkingLimit:
    return ThinkingLimit(max_tokens, bytes_of("</think>"), bytes_of("\n</think>\n\n"))


# How long a model may think


@pytest.mark.parametrize("field", ["max_thinking_tokens", "thinking_token_budget", "reasoning_max_tokens"])
async def test_a_thought_has_a_limit(field: str) -> None:
    server = Server()
    assert (await server.chat(enable_thinking=True, **{field: 7})).status_code == 200
    assert sampled(server).thinking == limit_of(7)


@pytest.mark.parametrize("fields", [{"max_thinking_tokens": 7}, {"enable_thinking": True, "max_thinking_tokens": None}])
async def test_without_a_thought_or_a_number_there_is_no_limit(fields: dict[str, Any]) -> None:
    server = Server()
    assert (await server.chat(**fields)).status_code == 200
    assert sampled(server).thinking is None


@pytest.mark.parametrize("value", [-1, 1.5, "7", True])
@pytest.mark.parametrize("field", ["max_thinking_tokens", "thinking_token_budget"])
async def test_a_limit_that_is_none_is_refused_by_name(field: str, value: Any) -> None:
    response = await Server().chat(**{field: value})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field


async def test_a_limit_and_a_format_go_together() -> None:
    server = Server()
    await server.chat(enable_thinking=True, max_thinking_tokens=3, guided_choice=["yes", "no"])
    assert sampled(server).thinking == limit_of(3)
    assert "thinking" in sampled(server).grammar


async def test_a_budget_in_anthropics_words() -> None:
    server = Server()
    body: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}
    await server.post("/v1/messages", body | {"thinking": {"type": "enabled", "budget_tokens": 5}})
    assert sampled(server).thinking == limit_of(5)
    await server.post("/v1/messages", body | {"thinking": {"type": "disabled"}})
    assert sampled(server).thinking is None


async def test_a_thought_that_was_ended_is_no_part_of_the_content() -> None:
    server = Server(FakeBackend(say("mul\n</think>\n\n42")))
    body = (await server.chat(enable_thinking=True, max_thinking_tokens=3, logprobs=True)).json()
    choice = body["choices"][0]
    assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == ("mul", "42")
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == ["4", "2"]
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == len("mul\n</think>")


# What is counted


class SeeingProcessor(FakeProcessor):
    """Two pictures of 6 tokens and a video of 4 in every chat."""

    def chat(self, *args: Any, **options: Any) -> GenerationRequest:
        picture = MediaInput("image", b"m" * 32, (1, 4, 6), offset=0, num_tokens=6, patches=None)
        video = MediaInput("video", b"v" * 32, (4, 4, 2), offset=6, num_tokens=4, patches=None)
        return replace(super().chat(*args, **options), media=(picture, video, picture))


@pytest.mark.parametrize("is_stream", [False, True])
async def test_usage_tells_of_what_the_tokens_are(is_stream: bool) -> None:
    server = Server(FakeBackend(say("hm</think>ok"), num_cached_tokens=5), SeeingProcessor())
    options = {"stream": True, "stream_options": {"include_usage": True}} if is_stream else {}
    response = await server.chat(enable_thinking=True, n=2, **options)
    usage = (events_of(response.text)[-2] if is_stream else response.json())["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 5, "image_tokens": 12, "video_tokens": 4}
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 2 * len("hm</think>")}
    assert usage["completion_tokens"] == 2 * len("hm</think>ok" + "$")


# Token ids


async def test_token_ids_of_a_chat() -> None:
    backend = FakeBackend(scripts={0: say("hé"), 1: say("b")})
    body = (await Server(backend).chat(return_token_ids=True, n=2)).json()
    assert body["prompt_token_ids"] == list(bytes_of("<user>hi"))
    assert [choice["token_ids"] for choice in body["choices"]] == [[*bytes_of("hé"), EOS], [*bytes_of("b"), EOS]]


async def test_token_ids_of_completions_stand_with_each_choice() -> None:
    body = (await Server().complete(prompt=["ab", [1, 2]], return_token_ids=True)).json()
    assert [choice["prompt_token_ids"] for choice in body["choices"]] == [[97, 98], [1, 2]]
    assert [choice["token_ids"] for choice in body["choices"]] == [[*bytes_of("Hello"), EOS]] * 2
    assert "prompt_token_ids" not in body


@pytest.mark.parametrize("url", [CHAT_URL, COMPLETION_URL])
async def test_streamed_token_ids_come_with_their_news_and_the_prompts_once(url: str) -> None:
    """The second step is half a character, so it has nothing else to show."""
    gates = [asyncio.Event(), asyncio.Event()]
    steps = (Step((104,)), gates[0], Step((0xC3,)), gates[1], Step((0xA9, EOS), FinishReason.STOP))
    server = Server(FakeBackend(steps))
    what = {"messages": [{"role": "user", "content": "hi"}], "prompt": "<user>hi"}
    body = json.dumps({"model": "tiny", "stream": True, "return_token_ids": True, **what}).encode()
    connection = Connection(server.app, body, url=url)
    await connection.message()
    events = await connection.events()
    for gate in gates:
        gate.set()
        events += await connection.events()
    await connection.task
    assert events.pop() == "[DONE]"
    choices = [event["choices"][0] for event in events]
    assert [choice["token_ids"] for choice in choices] == [[104], [0xC3], [0xA9, EOS]]
    prompts = [place.get("prompt_token_ids") for place in (events if url == CHAT_URL else choices)]
    assert prompts == [list(bytes_of("<user>hi")), None, None]


@pytest.mark.parametrize("fields", [{}, {"return_token_ids": False}])
async def test_nobody_gets_token_ids_unasked(fields: dict[str, Any]) -> None:
    text = (await Server().chat(**fields)).text + (await Server().chat(stream=True, **fields)).text
    assert "token_ids" not in text


# Who comes first


@pytest.mark.parametrize(("fields", "priority"), [({}, 0), ({"priority": -100}, -100), ({"priority": None}, 0)])
async def test_a_priority_goes_into_every_request(fields: dict[str, Any], priority: int) -> None:
    server = Server()
    assert (await server.complete(prompt=["a", "b"], n=2, **fields)).status_code == 200
    assert [request.priority for request in server.backend.requests] == [priority] * 4


@pytest.mark.parametrize("value", [101, -101, 10**30, 0.5, "1", True])
async def test_a_priority_has_bounds(value: Any) -> None:
    response = await Server().chat(priority=value)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "priority"


# The everyday ones, in their own words and in the engine's

SAMPLING: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"max_tokens": 7}, {"max_tokens": 7}),
    ({"max_tokens": 7, "max_completion_tokens": 5}, {"max_tokens": 5}),
    ({"min_tokens": 3}, {"min_tokens": 3}),
    ({"temperature": 0}, {"temperature": 0.0}),
    ({"temperature": 2, "top_p": 0.5}, {"temperature": 2.0, "top_p": 0.5}),
    ({"top_k": 5}, {"top_k": 5}),
    ({"top_k": -1}, {"top_k": 0}),
    ({"min_p": 0.25}, {"min_p": 0.25}),
    ({"seed": -1}, {"seed": 2**64 - 1}),
    ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
    ({"presence_penalty": -2, "frequency_penalty": 2}, {"presence_penalty": -2.0, "frequency_penalty": 2.0}),
    ({"logit_bias": {"65": 100, "66": -0.5}}, {"logit_bias": ((65, 100.0), (66, -0.5))}),
    ({"stop_token_ids": [1, 2]}, {"stop_token_ids": (1, 2)}),
    ({"ignore_eos": True}, {"ignore_eos": True}),
]
ROOM = FakeProcessor().max_model_len - len("<user>hi")
NAMES = sorted({name for fields, _ in SAMPLING for name in fields})


@pytest.mark.parametrize(("fields", "wanted"), SAMPLING)
async def test_each_field_of_sampling_arrives_and_no_other_changes(
    fields: dict[str, Any], wanted: dict[str, Any]
) -> None:
    server = Server()
    whole = {"seed": 3} | fields
    assert (await server.chat(**whole)).status_code == 200
    assert (await server.complete(**whole)).status_code == 200
    expected = [replace(SamplingParams(max_tokens=most, seed=3), **wanted) for most in (ROOM, TEXT_MAX_TOKENS)]
    assert [request.sampling for request in server.backend.requests] == expected


@pytest.mark.parametrize("key", ["01", "00", "-1", "1.0", "", "a", "1\n", "1234567890"])
async def test_a_token_has_one_name_in_logit_bias(key: str) -> None:
    """Else of two values for one token one would win in silence."""
    response = await Server().chat(logit_bias={"1": 1, key: 2, "0": 3})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, f"logit_bias.{key}")


async def test_null_is_as_good_as_nothing() -> None:
    server = Server()
    nothing = dict.fromkeys([*NAMES, "n", "stop", "stream", "user", "logprobs", "priority"]) | {"seed": 3}
    assert (await server.chat(**nothing)).status_code == 200
    assert sampled(server) == SamplingParams(max_tokens=ROOM, seed=3)


@pytest.mark.parametrize(("stop", "text"), [("l", "He"), (["lo", "zzz"], "Hel"), ([], "Hello")])
async def test_stop_is_a_string_or_a_list(stop: Any, text: str) -> None:
    assert (await Server().chat(stop=stop)).json()["choices"][0]["message"]["content"] == text


async def test_n_answers_differ_by_their_seeds() -> None:
    server = Server()
    body = (await server.chat(n=3, seed=5, user="somebody")).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert sorted(request.sampling.seed for request in server.backend.requests) == [5, 6, 7]


@pytest.mark.parametrize(
    ("effort", "thinks"),
    [("none", False), ("minimal", False), *((e, True) for e in ("low", "medium", "high", "xhigh", "max"))],
)
async def test_reasoning_effort_is_with_or_without(effort: str, thinks: bool) -> None:
    server = Server()
    assert (await server.chat(reasoning_effort=effort)).status_code == 200
    body = {"model": "tiny", "input": "hi", "reasoning": {"effort": effort}}
    assert (await server.post("/v1/responses", body)).status_code == 200
    assert [call["enable_thinking"] for call in server.processor.calls] == [thinks, thinks]


@pytest.mark.parametrize("name", UNSUPPORTED)
async def test_what_cannot_be_honoured_is_refused_unless_it_asks_for_nothing(name: str) -> None:
    for value in UNSUPPORTED[name]:
        assert (await Server().chat(**{name: value})).status_code == 200
    response = await Server().chat(**{name: ["something"]})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, name, "unsupported_parameter")
