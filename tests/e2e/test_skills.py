"""The packaged model's answers, over HTTP and over gRPC: it points, sees what moves, looks twice, calculates, searches.

That all parts play together is the point, not how well this model does: the floors lie below its scores.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import httpx
import pytest

from ernie_cluster.cli.local import is_packaged
from ernie_cluster.client import Client, image, user, video
from ernie_cluster.skills.catalog import HELD_OUT, draw
from ernie_cluster.skills.judge import judge
from ernie_cluster.skills.sample import Sample
from ernie_cluster.skills.tools import next_turn
from tests.e2e.application import CHAT, Application
from tests.e2e.shown import MODEL

pytestmark = pytest.mark.skipif(not is_packaged(), reason="no pocket checkpoint in this tree")

MAX_TOKENS = 256
NUM_ASKED = 6
PHOTO_SEEDS = range(HELD_OUT + 7000, HELD_OUT + 7006)
"""Of the pictures in the folder that can be searched."""


class Reply(NamedTuple):
    """What both ways tell."""

    text: str
    called: list[tuple[str, Any]]
    """Names and arguments of the tools that the server ran."""
    num_images: int
    """Pictures that they showed to the model."""
    details: list[dict[str, Any]]


Ask = Callable[..., Reply]


def over_http(app: Application, sample: Sample, tools: Sequence[str] = (), function: str = "") -> Reply:
    body: dict[str, Any] = {
        "model": MODEL,
        "messages": sample.wire_messages(),
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "enable_thinking": sample.enable_thinking,
        "include_tool_results": True,
    }
    if tools:
        body["tools"] = [{"type": name} for name in tools]
    if function:
        body["tool_choice"] = {"type": "function", "function": {"name": function}}
    response = httpx.post(app.url + CHAT, json=body, timeout=60)
    assert response.status_code == 200, response.text
    message = response.json()["choices"][0]["message"]
    calls = message.get("builtin_tool_calls", [])
    shown = [shown for call in calls for shown in call["result"].get("images", ())]
    assert all(picture["url"].startswith("data:image/jpeg;base64,") for picture in shown)
    called = [(call["type"], json.loads(call["arguments"])) for call in calls]
    return Reply(message["content"] or "", called, len(shown), [call["result"] for call in calls])


def over_grpc(app: Application, sample: Sample, tools: Sequence[str] = (), function: str = "") -> Reply:
    fields: dict[str, Any] = {"tool_choice": {"function": function}} if function else {}
    (message,) = sample.wire_messages()
    parts = (
        message["content"] if isinstance(message["content"], list) else [{"type": "text", "text": message["content"]}]
    )
    kinds: dict[str, Callable[[dict[str, Any]], Any]] = {
        "text": lambda part: part["text"],
        "image_url": lambda part: image(part["image_url"]["url"]),
        "video_url": lambda part: video(part["video_url"]["url"]),
    }
    with Client(app.grpc_target, timeout_s=60) as client:
        (choice,) = client.chat(
            MODEL,
            [user(*(kinds[part["type"]](part) for part in parts))],
            sampling={"max_tokens": MAX_TOKENS, "temperature": 0},
            enable_thinking=sample.enable_thinking,
            tools=[{"builtin": name} for name in tools],
            include_tool_results=True,
            **fields,
        ).choices
    calls = choice.builtin_tool_calls
    assert all(picture.data.startswith(b"\xff\xd8") for call in calls for picture in call.images)
    return Reply(
        choice.message.text,
        [(call.name, json.loads(call.arguments)) for call in calls],
        sum(len(call.images) for call in calls),
        [json.loads(call.details or "{}") for call in calls],
    )


@pytest.mark.parametrize("ask", [over_http, pytest.param(over_grpc, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("skill", "least"), [("ground", 3), ("motion", 4)])
def test_it_points_and_sees_what_moves(app: Application, ask: Ask, skill: str, least: int) -> None:
    samples = [draw(skill, seed) for seed in range(HELD_OUT + 7000, HELD_OUT + 7000 + NUM_ASKED)]
    replies = [ask(app, sample) for sample in samples]
    assert sum(judge(sample, reply.text) for sample, reply in zip(samples, replies, strict=True)) >= least, replies


@pytest.mark.parametrize("ask", [over_http, pytest.param(over_grpc, marks=pytest.mark.slow)])
def test_it_looks_twice(app: Application, ask: Ask) -> None:
    samples = [draw("zoom", seed) for seed in range(HELD_OUT + 7000, HELD_OUT + 7000 + NUM_ASKED)]
    replies = [ask(app, sample, ["image_zoom_in_tool"]) for sample in samples]
    right = [
        judge(last_turn(sample), reply.text) and bool(reply.num_images)
        for sample, reply in zip(samples, replies, strict=True)
    ]
    assert sum(right) >= NUM_ASKED // 2, replies


@pytest.mark.parametrize("ask", [over_http, over_grpc])
def test_it_calculates(app: Application, ask: Ask) -> None:
    drawn = (draw("tool", seed) for seed in range(HELD_OUT + 7000, HELD_OUT + 7040))
    samples = [s for s in drawn if s.tool_call is not None and s.tool_call.name == "calculator"][:NUM_ASKED]
    replies = [ask(app, sample, ["calculator"]) for sample in samples]
    right = [
        judge(last_turn(sample), reply.text) and bool(reply.called)
        for sample, reply in zip(samples, replies, strict=True)
    ]
    assert sum(right) >= NUM_ASKED // 3, replies


def last_turn(sample: Sample) -> Sample:
    """The conversation after the call that should be made, which waits for the answer."""
    assert sample.tool_call is not None
    after = next_turn(sample, [sample.tool_call])
    assert after is not None
    return after


@pytest.mark.parametrize("ask", [over_http, over_grpc])
def test_it_finds_pictures_that_look_alike(app: Application, ask: Ask) -> None:
    """The model knows no such tool and is made to call it; what is found, the vision pool and the index decide."""
    for seed in PHOTO_SEEDS[:3]:
        reply = ask(app, draw("zoom", seed), ["image_search"], "image_search")
        name, arguments = reply.called[0]
        found = reply.details[0]["found"]
        assert (name, reply.details[0]["bbox_2d"]) == ("image_search", arguments["bbox_2d"])
        assert {hit["name"] for hit in found} < {f"{photo}.png" for photo in PHOTO_SEEDS}
        assert len({hit["name"] for hit in found}) == len(found) == reply.num_images == 3
        scores = [hit["score"] for hit in found]
        assert scores == sorted(scores, reverse=True)
        assert scores[0] > 0.7, "a part of one of these pictures"
        assert reply.text, "it answers after it has seen them"
