"""Tools that the server runs itself: the rounds of an answer, and what a client sees of them."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any, cast

import pytest

from ernie_cluster.api.limits import ApiLimits
from ernie_cluster.builtin.registry import TOOLS
from ernie_cluster.config.api import ApiConfig
from ernie_cluster.config.convert import build
from ernie_cluster.errors import ConfigError, ContextTooLong, Overloaded
from ernie_cluster.request import GenerationRequest, Span
from tests.fakes import FakeBackend, bytes_of, say
from tests.unit.api.client import CHAT_URL, Connection, Server, chat_body, events_of
from tests.unit.api.rounds import ADD, ASKED, BOX, CALCULATOR, LOOK, PICTURE, URL, ZOOM, Rounds, Seeing, call, hash_of
from tests.unit.api.test_guard import House
from tests.unit.api.test_openai_client import connect

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

THINK = {"enable_thinking": True}
FIRST = f"I zoom in.</think>\n\n{LOOK}"
SECOND = "I see it.</think>\n\nIt says 7."
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def serve(*rounds: Any, limits: ApiLimits | None = None, **more: Any) -> Server:
    return Server(Rounds(*rounds, **more), Seeing(), limits or ApiLimits())


async def ask(server: Server, **fields: Any) -> dict[str, Any]:
    """The only choice of a whole answer."""
    response = await server.chat(**{"tools": [ZOOM, CALCULATOR], "messages": ASKED, "max_tokens": 2000, **fields})
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def results_of(choice: dict[str, Any]) -> list[dict[str, Any]]:
    return [called["result"] for called in choice["message"]["builtin_tool_calls"]]


async def test_the_model_zooms_in_and_answers() -> None:
    server = serve(FIRST, SECOND)
    choice = await ask(server, **THINK)
    message = choice["message"]
    assert (message["content"], choice["finish_reason"]) == ("It says 7.", "stop")
    assert message["reasoning_content"] == "I zoom in.\n\nI see it."
    assert "tool_calls" not in message
    (called,) = message["builtin_tool_calls"]
    assert called["type"] == "image_zoom_in_tool"
    assert json.loads(called["arguments"]) == {"bbox_2d": BOX, "label": "sign"}
    assert called["result"] == {"picture": 1, "bbox_2d": BOX, "images": [{"width": 84, "height": 56}]}


async def test_the_second_prompt_holds_the_call_and_the_crop() -> None:
    server = serve(FIRST, SECOND)
    await ask(server, **THINK)
    first, second = server.processor.calls
    asked, called, result = second["messages"]
    assert [asked] == first["messages"]
    assert (called["role"], called["content"], called["reasoning_content"]) == ("assistant", "", "I zoom in.")
    assert called["tool_calls"][0]["function"]["name"] == "image_zoom_in_tool"
    assert (result["role"], result["tool_call_id"]) == ("tool", called["tool_calls"][0]["id"])
    assert result["content"] == [{"type": "image_url", "image_url": {"url": URL, "regions": (tuple(BOX),)}}]
    assert first["tools"] == second["tools"] == [dict(TOOLS[t["type"]].definition) for t in (ZOOM, CALCULATOR)]
    before, after = server.backend.requests
    assert [m.media_hash for m in before.media] == [hash_of(URL)]
    assert [m.media_hash for m in after.media] == [hash_of(URL), hash_of(URL, (tuple(BOX),))]
    assert bytes(after.prompt_token_ids[: len(before.prompt_token_ids) - len("<think>")].tolist()).endswith(b"sign?")


async def test_each_round_is_a_request_with_what_is_left() -> None:
    server = serve(FIRST, SECOND)
    await ask(server, **THINK, max_tokens=1000, min_tokens=30, seed=5, cache_salt="s")
    before, after = server.backend.requests
    used = len(bytes_of(FIRST)) + 1
    assert after.request_id != before.request_id
    assert (after.sampling.max_tokens, after.sampling.min_tokens) == (1000 - used, 0)
    assert (after.sampling.seed, after.cache_salt) == (before.sampling.seed, before.cache_salt)
    assert 0 < after.timeout_s <= before.timeout_s


async def test_usage_and_timeline_add_up_over_the_rounds() -> None:
    server = serve(FIRST, SECOND, num_cached_tokens=3, spans=(Span("prefill", 1.0, 2.0),))
    response = (await server.chat(tools=[ZOOM], messages=ASKED, **THINK, include_timeline=True)).json()
    usage = response["usage"]
    assert usage["prompt_tokens"] == sum(r.num_prompt_tokens for r in server.backend.requests)
    assert usage["completion_tokens"] == len(FIRST) + len(SECOND) + 2
    assert usage["prompt_tokens_details"]["cached_tokens"] == 6
    assert usage["completion_tokens_details"]["reasoning_tokens"] == len("I zoom in.</think>I see it.</think>")
    stages = [stage["name"] for stage in response["timeline"]]
    assert sorted(stages) == ["prefill", "prefill", "preprocess", "tools"]
    assert server.metrics.value("ernie_prompt_tokens_total", model="tiny") == usage["prompt_tokens"]


async def test_the_stream_shows_the_calls_where_they_happen() -> None:
    server = serve(FIRST, SECOND)
    response = await server.chat(tools=[ZOOM], messages=ASKED, **THINK, stream=True)
    *events, done = events_of(response.text)
    assert done == "[DONE]"
    choices = [event["choices"][0] for event in events]
    assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + ["stop"]
    deltas = [c["delta"] for c in choices]
    assert "".join(d.get("reasoning_content", "") for d in deltas) == "I zoom in.\n\nI see it."
    assert "".join(d.get("content", "") for d in deltas) == "It says 7."
    assert not any("tool_calls" in d for d in deltas)
    (at,) = [i for i, d in enumerate(deltas) if "builtin_tool_calls" in d]
    assert "zoom" in "".join(d.get("reasoning_content", "") for d in deltas[: at + 1])
    assert not any("content" in d and d["content"] for d in deltas[:at])
    (called,) = deltas[at]["builtin_tool_calls"]
    whole = (await ask(serve(FIRST, SECOND), **THINK))["message"]["builtin_tool_calls"][0]
    assert called.keys() - whole.keys() == {"index"}
    assert (called["index"], called["result"]) == (0, whole["result"])


async def test_the_official_client_understands_the_stream() -> None:
    async with (
        connect(serve(FIRST, f"More.</think>\n\n{ADD}", SECOND)) as client,
        client.chat.completions.stream(
            model="tiny",
            messages=cast("Any", ASKED),
            tools=cast("Any", [ZOOM, CALCULATOR]),
            max_tokens=2000,
            extra_body=THINK,
        ) as stream,
    ):
        raw = [event.chunk.choices[0].delta async for event in stream if event.type == "chunk"]
    assert "".join(delta.content or "" for delta in raw) == "It says 7."
    calls = [c for delta in raw for c in getattr(delta, "builtin_tool_calls", None) or []]
    assert [(c["index"], c["type"]) for c in calls] == [(0, "image_zoom_in_tool"), (1, "calculator")]


async def test_pictures_of_results_come_when_they_are_asked_for() -> None:
    (result,) = results_of(await ask(serve(LOOK, "7"), include_tool_results=True))
    assert result["images"][0]["url"].startswith("data:image/jpeg;base64,")


async def test_several_calls_of_one_round_and_text_between_rounds() -> None:
    server = serve(f"Let me see.\n{ADD}{LOOK}", f"And again.\n{ADD}", "Done.")
    choice = await ask(server)
    assert choice["message"]["content"] == "Let me see.\n\nAnd again.\n\nDone."
    assert [result.get("text") for result in results_of(choice)] == ["408", None, "408"]
    roles = [m["role"] for m in server.processor.calls[2]["messages"]]
    assert roles == ["user", "assistant", "tool", "tool", "assistant", "tool"]
    assert server.processor.calls[2]["messages"][1]["content"] == "Let me see."
    assert len({called["id"] for called in choice["message"]["builtin_tool_calls"]}) == 3


async def test_each_of_several_answers_has_rounds_of_its_own() -> None:
    server = serve(ADD, "408")
    response = (await server.chat(tools=[CALCULATOR], n=2)).json()
    assert [c["message"]["content"] for c in response["choices"]] == ["408", "408"]
    assert len({r.request_id for r in server.backend.requests}) == 4
    first, _, *further = (r.num_prompt_tokens for r in server.backend.requests)
    assert response["usage"]["prompt_tokens"] == first + sum(further)


async def test_rounds_are_bounded() -> None:
    server = serve(ADD, limits=ApiLimits(max_tool_rounds=2))
    choice = await ask(server)
    assert (choice["finish_reason"], len(server.backend.requests)) == ("length", 3)
    assert [r.get("text", "") for r in results_of(choice)] == ["408", "408", ""]
    assert "at most 2 rounds" in results_of(choice)[2]["error"]


async def test_an_answer_without_a_bound_is_not_cut_by_its_rounds() -> None:
    server = serve(ADD * 4, "x" * 500)
    choice = await ask(server, max_tokens=None)
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", "x" * 500)
    assert server.backend.requests[0].max_total_tokens == 4096
    operator = serve(ADD * 4, "x" * 500, limits=ApiLimits(default_max_tokens=600))
    assert (await ask(operator, max_tokens=None))["finish_reason"] == "length"


async def test_tokens_are_bounded_over_all_rounds() -> None:
    num_tokens = len(bytes_of(ADD)) + 1
    used_up = await ask(server := serve(ADD, "408"), max_tokens=num_tokens)
    assert (used_up["finish_reason"], len(server.backend.requests)) == ("length", 1)
    cut = await ask(serve(ADD, "408"), max_tokens=num_tokens + 2)
    assert (cut["finish_reason"], cut["message"]["content"]) == ("length", "40")
    broken = await ask(serve(ADD, "408"), max_tokens=num_tokens - 25)
    assert (broken["finish_reason"], results_of(broken)) == ("length", [{"error": "not run: the answer was cut off"}])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (call("image_zoom_in_tool", {}), "bbox_2d is None"),
        (call("image_zoom_in_tool", {"bbox_2d": [1, 2, 3]}), "four numbers"),
        (call("image_zoom_in_tool", {"bbox_2d": [1000, 0, 1400, 9]}), "holds nothing"),
        (call("image_zoom_in_tool", {"bbox_2d": BOX, "picture": 2}), "there is no picture 2; there are 1 to 1"),
        (call("calculator", {"expression": "1/0"}), "cannot be evaluated"),
        (call("calculator", {"expression": "import os"}), "only numbers"),
        (call("calculator", '{"expression": 1+1}'), "Expecting"),
        (call("calculator", '{"expression": "\\ud800"}'), "cannot be evaluated"),
    ],
)
async def test_faults_of_a_call_are_told_to_the_model(text: str, words: str) -> None:
    server = serve(text, "I cannot.")
    choice = await ask(server)
    assert (choice["message"]["content"], choice["finish_reason"]) == ("I cannot.", "stop")
    assert words in results_of(choice)[0]["error"]
    told = server.processor.calls[1]["messages"][-1]["content"]
    assert told.startswith("Error: ")
    assert words in told
    told.encode()


async def test_pictures_beyond_the_limit_are_told_to_the_model_as_a_fault() -> None:
    one = 4 * 6 * 14 * 14
    server = serve(LOOK, LOOK, "7", limits=ApiLimits(max_tool_pixels=one))
    choice = await ask(server)
    assert choice["message"]["content"] == "7"
    fine, refused = results_of(choice)
    assert "images" in fine
    assert f"{2 * one} pixels" in refused["error"]
    assert len(server.backend.requests[2].media) == 2


class Full(Seeing):
    """Has no room for a second turn."""

    def chat(self, messages: list[dict[str, Any]], **options: Any) -> GenerationRequest:
        if len(messages) > 1:
            raise ContextTooLong("too long")
        return super().chat(messages, **options)


async def test_a_result_without_room_in_the_context_ends_the_answer() -> None:
    server = Server(Rounds(ADD, "408"), Full())
    choice = await ask(server)
    assert results_of(choice) == [{"error": "too long"}]
    assert (choice["finish_reason"], len(server.backend.requests)) == ("length", 1)


async def test_the_picture_of_the_last_user_is_meant_and_crops_can_be_zoomed_into() -> None:
    other = {"type": "image_url", "image_url": {"url": "data:image/png;base64,BB=="}}
    messages = [*ASKED, {"role": "assistant", "content": "A sign."}, {"role": "user", "content": [other]}]
    again = call("image_zoom_in_tool", {"bbox_2d": BOX, "picture": 3})
    server = serve(LOOK, again, "7")
    await ask(server, messages=messages)
    region, url = tuple(BOX), "data:image/png;base64,BB=="
    seen = [m.media_hash for m in server.backend.requests[2].media]
    assert seen[2:] == [hash_of(url, (region,)), hash_of(url, (region, region))]


async def test_a_client_cannot_name_regions() -> None:
    sneaky = {"type": "image_url", "image_url": {"url": URL, "regions": "x", "content": "x"}}
    server = serve("7")
    await ask(server, messages=[{"role": "user", "content": [sneaky]}])
    assert server.processor.calls[0]["messages"][0]["content"] == [PICTURE]


async def test_calls_of_the_client_s_functions_end_the_answer() -> None:
    theirs = call("weather", {"city": "Ulm"})
    server = serve(ADD, f"Now.\n{ADD}{theirs}")
    choice = await ask(server, tools=[CALCULATOR, WEATHER])
    assert choice["finish_reason"] == "tool_calls"
    (called,) = choice["message"]["tool_calls"]
    assert called["function"] == {"name": "weather", "arguments": '{"city": "Ulm"}'}
    assert choice["message"]["content"] == "Now."
    done, left = results_of(choice)
    assert done == {"text": "408"}
    assert left["error"].startswith("not run")
    assert len(server.backend.requests) == 2


async def test_a_function_of_the_client_s_may_be_called_like_one_of_ours() -> None:
    theirs = {"type": "function", "function": {"name": "calculator"}}
    server = serve(ADD)
    choice = await ask(server, tools=[theirs, ZOOM])
    assert choice["finish_reason"] == "tool_calls"
    assert "builtin_tool_calls" not in choice["message"]
    both = await server.chat(tools=[theirs, CALCULATOR])
    assert (both.status_code, both.json()["error"]["param"]) == (400, "tools[1]")


@pytest.mark.parametrize("kind", ["web_search", ""])
async def test_unknown_tools_are_refused(kind: str) -> None:
    response = await serve("7").chat(tools=[{"type": kind}])
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "tools[0].type")
    assert "image_zoom_in_tool, calculator" in error["message"]


async def test_a_forced_call_is_forced_once() -> None:
    server = serve(ADD, "408")
    choice = await ask(server, tool_choice="required")
    assert choice["message"]["content"] == "408"
    before, after = server.backend.requests
    assert before.sampling.grammar
    assert after.sampling.grammar == ""
    unoffered = await ask(serve(ADD), tool_choice="none")
    assert unoffered["message"]["content"] == ADD


async def test_a_stop_string_after_a_call_ends_the_answer() -> None:
    choice = await ask(serve(f"{ADD}So it is.", "408"), stop=["is."])
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", "So it ")


async def test_default_tools_are_offered_where_a_chat_says_nothing_of_tools() -> None:
    server = Server(Rounds(ADD, "408"), Seeing(), default_tools=("calculator",))
    whole = (await server.chat()).json()["choices"][0]
    assert (whole["message"]["content"], results_of(whole)) == ("408", [{"text": "408"}])
    for tools in ([], [WEATHER]):
        await server.chat(tools=tools)
        assert server.processor.calls[-1]["tools"] == (tools or None)


def test_the_configuration_knows_the_same_tools() -> None:
    search = {"index": "/photos.index", "folder": "/photos"}
    assert build(ApiConfig, {"builtin_tools": list(TOOLS), "image_search": search}).builtin_tools == tuple(TOOLS)
    for wrong in (["abacus"], ["calculator", "calculator"], ["image_search"]):
        with pytest.raises(ConfigError, match="builtin_tools"):
            build(ApiConfig, {"builtin_tools": wrong})


async def test_other_dialects_get_the_same_answer() -> None:
    body = {"model": "tiny", "input": "What is 12*34?", "tools": [CALCULATOR]}
    response = (await serve(f"I add.\n{ADD}", "408").post("/v1/responses", body)).json()
    assert [item["content"][0]["text"] for item in response["output"]] == ["I add.\n\n408"]
    assert response["tools"] == [CALCULATOR]
    message = {**chat_body(), "max_tokens": 200, "tools": [CALCULATOR]}
    answer = (await serve(f"I add.\n{ADD}", "408").post("/v1/messages", message)).json()
    assert (answer["content"][0]["text"], answer["stop_reason"]) == ("I add.\n\n408", "end_turn")


@pytest.mark.parametrize("is_stream", [False, True])
async def test_no_room_for_a_further_round(is_stream: bool) -> None:
    response = await serve(f"I add.\n{ADD}", [Overloaded("full", 2.0)]).chat(tools=[CALCULATOR], stream=is_stream)
    assert response.status_code == (200 if is_stream else 429)
    assert "full" in response.text


async def test_a_client_that_leaves_between_rounds_ends_them() -> None:
    backend = Rounds(ADD, [asyncio.Event()])
    connection = Connection(
        Server(backend, Seeing()).app, json.dumps(chat_body(tools=[CALCULATOR], stream=True)).encode()
    )
    await backend.arrivals.get()
    second = await backend.arrivals.get()
    connection.disconnect()
    await asyncio.gather(connection.task, return_exceptions=True)
    assert backend.aborted == [second.request_id]


class Slow(Seeing):
    """Makes the prompt of the second round only when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.get_running_loop()
        self.is_at_it = asyncio.Event()
        self.may_go_on = threading.Event()

    def chat(self, messages: list[dict[str, Any]], **options: Any) -> GenerationRequest:
        if self.calls:
            self.loop.call_soon_threadsafe(self.is_at_it.set)
            assert self.may_go_on.wait(10)
        return super().chat(messages, **options)


async def test_a_client_that_leaves_while_tools_run_gets_no_further_round() -> None:
    """And the event loop is free while they do."""
    server = Server(Rounds(ADD, "408"), slow := Slow())
    connection = Connection(server.app, json.dumps(chat_body(tools=[CALCULATOR])).encode())
    await slow.is_at_it.wait()
    connection.disconnect()
    await asyncio.gather(connection.task, return_exceptions=True)
    slow.may_go_on.set()
    assert (len(server.backend.requests), len(server.backend.finished)) == (1, 1)


async def test_the_deadline_holds_over_all_rounds() -> None:
    server = serve(ADD, [asyncio.Event()], limits=ApiLimits(request_timeout_s=1.0))
    response = await server.chat(tools=[CALCULATOR])
    assert response.status_code == 504
    assert server.backend.aborted == [server.backend.requests[1].request_id]


async def test_a_round_gets_the_time_that_those_before_have_left() -> None:
    server = serve(ADD, ADD, "408", limits=ApiLimits(request_timeout_s=60.0))
    await ask(server)
    first, second, third = (request.timeout_s for request in server.backend.requests)
    assert 60 > first > second > third > 0


async def test_a_key_pays_for_all_rounds(tmp_path: Path) -> None:
    house = House(tmp_path, cast("FakeBackend", Rounds(LOOK, "7")), Seeing())
    house.admit(alice={"tokens": 100_000, "pixels": 1_000_000})
    usage = (await house.chat(messages=ASKED, tools=[ZOOM])).json()["usage"]
    headers = (await house.chat(messages=[{"role": "user", "content": "x"}], max_tokens=1)).headers
    left = 100_000 - usage["total_tokens"] - len("<user>x") - 1
    assert int(headers["x-ratelimit-remaining-tokens"]) == left
    assert int(headers["x-ratelimit-remaining-pixels"]) == 1_000_000 - 3 * 4 * 6 * 14 * 14


async def test_without_our_tools_nothing_changes() -> None:
    server = Server(FakeBackend(say(ADD)))
    choice = (await server.post(CHAT_URL, chat_body(tools=[WEATHER]))).json()["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "calculator"
    assert len(server.backend.requests) == 1
