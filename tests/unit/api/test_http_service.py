"""The routes, over fakes: answers whole and streamed, errors early and late, and clients that leave."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest

from ernie_cluster.api.backend import ModelStatus, ReplicaExperts
from ernie_cluster.api.limits import ApiLimits
from ernie_cluster.config.experts import LayerExperts
from ernie_cluster.errors import DeadlineExceeded, Overloaded, ReplicaLost
from ernie_cluster.request import FinishReason, Span
from tests.fakes import FakeBackend, Script, Step, bytes_of, say
from tests.unit.api.client import CHAT_URL, COMPLETION_URL, Connection, Server, chat_body, events_of

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]


def stream_body(**fields: Any) -> bytes:
    return json.dumps(chat_body(stream=True, **fields)).encode()


def text_of(events: list[Any], index: int = 0) -> str:
    return "".join(
        choice["delta"].get("content", "")
        for event in events
        if event != "[DONE]"
        for choice in event["choices"]
        if choice["index"] == index
    )


# Whole answers


async def test_chat_whole() -> None:
    backend = FakeBackend(say("Grüß dich"), num_cached_tokens=3)
    response = await Server(backend).chat()
    body = response.json()
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert body["model"] == "tiny"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Grüß dich", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    num_prompt, num_completion = len("<user>hi"), len("Grüß dich".encode()) + 1
    assert body["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {"cached_tokens": 3, "image_tokens": 0, "video_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    assert "timeline" not in body
    assert backend.finished == [f"{body['id']}-0"]


async def test_completion_of_several_prompts_and_answers() -> None:
    server = Server(FakeBackend(scripts={i: say(f"answer {i}") for i in range(4)}, num_cached_tokens=1))
    body = (await server.complete(prompt=["ab", [1, 2, 3]], n=2, seed=7)).json()
    assert body["object"] == "text_completion"
    assert [(c["index"], c["text"]) for c in body["choices"]] == [(i, f"answer {i}") for i in range(4)]
    assert body["usage"]["prompt_tokens"] == 2 + 3
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 2
    requests = sorted(server.backend.requests, key=lambda r: r.request_id)
    assert [list(r.prompt_token_ids) for r in requests] == [[97, 98], [97, 98], [1, 2, 3], [1, 2, 3]]
    assert [r.sampling.seed for r in requests] == [7, 8, 7, 8]


async def test_requests_without_a_seed_get_different_ones() -> None:
    server = Server()
    await server.chat()
    await server.chat()
    assert len({r.sampling.seed for r in server.backend.requests}) == 2


async def test_max_tokens_ends_the_answer_with_length() -> None:
    choice = (await Server(FakeBackend(say("Hello"))).chat(max_tokens=3)).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Hel", "length")


@pytest.mark.parametrize(("default", "expected"), [(None, [502, 12, 256, 12]), (100, [100, 12, 100, 12])])
async def test_default_max_tokens_is_what_the_context_leaves(default: int | None, expected: list[int]) -> None:
    """Of a chat; for texts, and where the operator says so, it is less."""
    server = Server(limits=ApiLimits(default_max_tokens=default))
    for text in ("x" * 4, "x" * 494):
        await server.chat(messages=[{"role": "user", "content": text}])
    for text in ("x" * 10, "x" * 500):
        await server.complete(prompt=text)
    assert [r.sampling.max_tokens for r in server.backend.requests] == expected


async def test_timeline_is_attached_when_asked_for() -> None:
    span = Span("prefill", 1e12, 0.25, (("replica", "prefill-1"), ("why", "idle"), ("why", "near")))
    server = Server(FakeBackend(say("a"), spans=(span,)))
    timeline = (await server.chat(include_timeline=True)).json()["timeline"]
    assert [stage["name"] for stage in timeline] == ["preprocess", "prefill"]
    detail = {"replica": "prefill-1", "why": ["idle", "near"]}
    assert timeline[1] == {"name": "prefill", "start_s": 1e12, "duration_s": 0.25, **detail}
    whose = (await server.chat(include_timeline=True, n=2)).json()["timeline"]
    assert sorted(stage.get("choice", -1) for stage in whose) == [-1, 0, 1]


# Stop strings


@pytest.mark.parametrize("tokens_per_step", [1, 2, 5, 100])
async def test_stop_string_across_tokens_aborts_the_rest(tokens_per_step: int) -> None:
    never = asyncio.Event()
    backend = FakeBackend([*say("one two STOP three", tokens_per_step, None), never])
    body = (await Server(backend).chat(stop=["STOP", "zzz"])).json()
    assert body["choices"][0]["message"]["content"] == "one two "
    assert body["choices"][0]["finish_reason"] == "stop"
    assert backend.aborted == [f"{body['id']}-0"]


async def test_stop_string_does_not_count_before_min_tokens() -> None:
    body = (await Server(FakeBackend(say("a.b.c.", 4))).chat(stop=".", min_tokens=3)).json()
    assert body["choices"][0]["message"]["content"] == "a.b"


async def test_the_end_token_is_no_text_and_an_unfinished_stop_string_is() -> None:
    body = (await Server(FakeBackend(say("wait..."))).chat(stop="....", stop_token_ids=[46])).json()
    assert body["choices"][0]["message"]["content"] == "wait..."


async def test_a_stop_token_is_left_out() -> None:
    script = [Step(bytes_of("hey")), Step(bytes_of("!"), FinishReason.STOP)]
    body = (await Server(FakeBackend(script)).chat(stop_token_ids=[33])).json()
    assert body["choices"][0]["message"]["content"] == "hey"
    assert body["usage"]["completion_tokens"] == 4


# Streams


async def test_stream_is_the_whole_answer_in_pieces() -> None:
    server = Server(FakeBackend(say("héllo wörld 🙂")))
    response = await server.chat(stream=True, stream_options={"include_usage": True}, include_timeline=True)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, trailer, done = events_of(response.text)
    assert done == "[DONE]"
    assert text_of(chunks) == "héllo wörld 🙂"
    assert {(c["id"], c["object"], c["model"]) for c in [*chunks, trailer]} == {
        (trailer["id"], "chat.completion.chunk", "tiny")
    }
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert trailer["choices"] == []
    assert trailer["usage"]["completion_tokens"] == len("héllo wörld 🙂".encode()) + 1
    assert trailer["timeline"][0]["name"] == "preprocess"


async def test_completion_stream() -> None:
    response = await Server(FakeBackend(say("abc"))).complete(stream=True)
    *chunks, done = events_of(response.text)
    assert done == "[DONE]"
    assert "".join(c["choices"][0]["text"] for c in chunks) == "abc"
    assert {c["object"] for c in chunks} == {"text_completion"}


async def test_stream_of_several_answers() -> None:
    server = Server(FakeBackend(scripts={0: say("first"), 1: say("second")}))
    events = events_of((await server.chat(stream=True, n=2)).text)
    assert [text_of(events, i) for i in range(2)] == ["first", "second"]
    roles = [c["index"] for e in events[:-1] for c in e["choices"] if "role" in c["delta"]]
    assert sorted(roles) == [0, 1]


async def test_first_token_leaves_at_once_and_the_rest_as_it_comes() -> None:
    first, second = asyncio.Event(), asyncio.Event()
    backend = FakeBackend([first, *say("A", finish_reason=None), second, *say("BC")])
    connection = Connection(Server(backend).app, stream_body())
    first.set()
    assert (await connection.message())["status"] == 200
    assert text_of(await connection.events()) == "A"
    second.set()
    rest: list[Any] = []
    while "[DONE]" not in rest:
        rest += await connection.events()
    assert text_of(rest) == "BC"
    await connection.task


async def test_half_a_character_is_held_back() -> None:
    gate = asyncio.Event()
    head, tail = bytes_of("é")[:1], bytes_of("é")[1:]
    connection = Connection(Server(FakeBackend([Step(head), gate, Step(tail), *say("")])).app, stream_body())
    await connection.message()
    assert text_of(await connection.events()) == ""
    gate.set()
    assert text_of(await connection.events()) == "é"
    await connection.task


# Errors


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (Overloaded("no room", 2.5), 429, "3"),
        (ReplicaLost("gone"), 503, "1"),
        (DeadlineExceeded("late"), 504, None),
        (RuntimeError("secret"), 500, None),
    ],
)
async def test_an_early_error_has_its_own_status(
    error: Exception, status: int, retry_after: str | None, is_stream: bool
) -> None:
    server = Server(FakeBackend([error]))
    response = await server.chat(stream=is_stream)
    assert response.status_code == status
    assert response.headers.get("retry-after") == retry_after
    assert response.headers["content-type"] == "application/json"
    message = response.json()["error"]["message"]
    if status in (500, 503):
        assert response.headers["x-request-id"] in message
        assert str(error) not in message
    else:
        assert message == str(error)
    assert len(response.headers.get_list("x-request-id")) == 1


@pytest.mark.parametrize(
    ("ending", "kind"),
    [
        ([ReplicaLost("gone")], "service_unavailable"),
        ([RuntimeError("secret")], "internal_error"),
        ([Step((), FinishReason.ABORT)], "aborted"),
        ([asyncio.CancelledError()], "service_unavailable"),
        ([], "service_unavailable"),  # the backend's stream ends without a reason
    ],
)
async def test_a_late_error_is_one_event_and_no_done(ending: Script, kind: str) -> None:
    gate = asyncio.Event()
    server = Server(FakeBackend([*say("par", finish_reason=None), gate, *say("t", finish_reason=None), *ending]))
    connection = Connection(server.app, stream_body())
    assert (await connection.message())["status"] == 200
    events = await connection.events()
    gate.set()
    await connection.task
    while (last := await connection.message())["more_body"]:
        events += events_of(last["body"].decode())
    events += events_of(last["body"].decode())
    assert text_of(events[:-1]) == "part"
    assert events[-1]["error"]["type"] == kind
    assert "secret" not in json.dumps(events)
    assert "gone" not in json.dumps(events)
    assert server.metrics.value("ernie_requests_in_flight", model="tiny") == 0


async def test_a_silent_end_is_an_error_of_a_whole_answer(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ernie_cluster"):
        response = await Server(FakeBackend(say("par", finish_reason=None))).chat()
    assert response.status_code == 503
    assert response.json()["error"]["type"] == "service_unavailable"
    assert "broke off after 3 tokens" in caplog.text


async def test_one_failed_choice_ends_the_others() -> None:
    never = asyncio.Event()
    backend = FakeBackend(scripts={0: [never], 1: [ReplicaLost("gone")]})
    response = await Server(backend).chat(n=2)
    assert response.status_code == 503
    assert [i[-2:] for i in backend.aborted] == ["-0"]


async def test_deadline_of_the_api_itself() -> None:
    never = asyncio.Event()
    backend = FakeBackend([never])
    response = await Server(backend, limits=ApiLimits(request_timeout_s=0.05)).chat()
    assert response.status_code == 504
    assert len(backend.aborted) == 1


@pytest.mark.parametrize(
    ("given", "most_s", "status"), [("0.05", 60.0, 504), ("60", 0.05, 504), ("1e9", 60.0, 200), (None, 60.0, 200)]
)
async def test_deadline_that_a_request_brings(given: str | None, most_s: float, status: int) -> None:
    backend = FakeBackend(say("Hello") if status == 200 else [asyncio.Event()])
    server = Server(backend, limits=ApiLimits(request_timeout_s=most_s))
    response = await server.post(CHAT_URL, chat_body(), {} if given is None else {"X-Request-Timeout": given})
    assert response.status_code == status, response.text
    assert backend.requests[0].timeout_s <= min(most_s, float(given or most_s))


@pytest.mark.parametrize("given", ["0", "-1", "nan", "soon", "", "1;2"])
async def test_deadline_that_is_none(given: str) -> None:
    response = await Server().post(CHAT_URL, chat_body(), {"X-Request-Timeout": given})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "x-request-timeout"


async def test_too_many_in_flight() -> None:
    never = asyncio.Event()
    server = Server(FakeBackend([never]), limits=ApiLimits(max_in_flight=1))
    connection = Connection(server.app, stream_body())
    await server.backend.arrivals.get()
    response = await server.chat()
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    connection.disconnect()
    await connection.task
    assert server.metrics.value("ernie_request_total", model="tiny", outcome="aborted") == 1


async def test_a_body_that_does_not_come() -> None:
    connection = Connection(Server(limits=ApiLimits(body_timeout_s=0.05)).app, b"{", is_complete=False)
    assert (await connection.message())["status"] == 408
    await connection.task


# Clients that leave


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("num_tokens", [0, 3])
async def test_leaving_aborts_the_request(is_stream: bool, num_tokens: int) -> None:
    backend = FakeBackend([*say("x" * num_tokens, finish_reason=None), asyncio.Event()])
    server = Server(backend)
    body = json.dumps(chat_body(stream=is_stream, n=2)).encode()
    connection = Connection(server.app, body)
    for _ in range(2):
        await backend.arrivals.get()
    if is_stream and num_tokens:
        await connection.message()
        assert text_of(await connection.events()) == "xxx"
    connection.disconnect()
    await connection.task
    assert sorted(i[-2:] for i in backend.aborted) == ["-0", "-1"]
    assert backend.finished == []
    assert server.metrics.value("ernie_requests_in_flight", model="tiny") == 0
    assert server.metrics.value("ernie_request_total", model="tiny", outcome="aborted") == 1


async def test_cancelling_the_app_aborts_the_request() -> None:
    backend = FakeBackend([*say("x", finish_reason=None), asyncio.Event()])
    connection = Connection(Server(backend).app, stream_body())
    await connection.message()
    connection.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await connection.task
    assert len(backend.aborted) == 1


async def test_leaving_in_the_body() -> None:
    server = Server()
    connection = Connection(server.app, b"{", is_complete=False)
    connection.disconnect()
    await connection.task
    assert server.metrics.value("ernie_request_total", model="unknown", outcome="aborted") == 1
    assert server.backend.requests == []


# Other routes


async def test_operators_routes() -> None:
    server = Server()
    assert (await server.get("/health")).json() == {"status": "ok"}
    assert set((await server.get("/version")).json()) == {"version"}
    await server.chat()
    metrics = await server.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    assert 'ernie_request_total{model="tiny",outcome="success"} 1.0' in metrics.text


async def test_the_place_and_use_of_every_expert() -> None:
    server = Server()
    server.backend.expert_news = [
        ReplicaExperts("m", "mixed", "m/mixed/1", [LayerExperts(3, (5, 0, 2, 2), ((0, -1, 2), (1, 0, 3)))])
    ]
    layer = {"layer": 3, "tokens": [5, 0, 2, 2], "table": [[0, -1, 2], [1, 0, 3]]}
    assert (await server.get("/debug/experts")).json() == {
        "object": "list",
        "data": [{"model": "m", "role": "mixed", "replica": "m/mixed/1", "layers": [layer]}],
    }
    server.backend.expert_news = ReplicaLost("gone")
    assert (await server.get("/debug/experts")).status_code == 503


async def test_shutdown_closes_the_backend() -> None:
    server = Server()
    async with server.app.router.lifespan_context(server.app):
        assert not server.backend.is_closed
    assert server.backend.is_closed


async def test_models() -> None:
    server = Server()
    listed = (await server.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert [m["id"] for m in listed["data"]] == ["tiny"]
    assert (await server.get("/v1/models/tiny")).json() == listed["data"][0]
    missing = await server.get("/v1/models/some/other")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("states", "status"),
    [
        ([ModelStatus("tiny", True, "")], 200),
        ([ModelStatus("tiny", True, ""), ModelStatus("big", False, "waiting for a decode replica")], 503),
        ([], 503),
        (ReplicaLost("router gone"), 503),
        (RuntimeError("bug"), 500),
    ],
)
async def test_readiness(states: list[ModelStatus] | Exception, status: int) -> None:
    server = Server()
    server.backend.states = states
    response = await server.get("/ready")
    assert response.status_code == status
    assert (await server.get("/health")).status_code == 200
    if isinstance(states, list):
        assert [m["detail"] for m in response.json()["models"]] == [s.detail for s in states]


@pytest.mark.parametrize(
    ("url", "status"),
    [("/nothing", 404), ("/v1/chat/completions", 405), ("/docs", 404), ("/health/", 404)],
)
async def test_unknown_routes_and_methods_answer_in_openai_shape(url: str, status: int) -> None:
    response = await Server().get(url)
    assert response.status_code == status
    assert response.json().keys() == {"error"}
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("given", "is_kept"),
    [("req-1", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("", False), ("ü", False)],
)
async def test_request_id(given: str, is_kept: bool) -> None:
    async with Server().client() as client:
        for url in ("/health", "/nothing"):
            response = await client.get(url, headers=[(b"x-request-id", given.encode())])
            assert (response.headers["x-request-id"] == given) is is_kept
            assert len(response.headers["x-request-id"]) > 0


async def test_one_request_id_may_come_twice() -> None:
    server = Server()
    for _ in range(2):
        response = await server.post(COMPLETION_URL, {"model": "tiny", "prompt": "p"}, {"x-request-id": "same"})
        assert response.status_code == 200
    assert len({r.request_id for r in server.backend.requests}) == 2
