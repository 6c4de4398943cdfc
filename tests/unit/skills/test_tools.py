"""The tools themselves, and the turn that follows a call."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from ernie_cluster.skills.sample import Picture, Sample, ToolCall, user
from ernie_cluster.skills.tools import CALCULATOR, WEATHER, ZOOM, crop, next_turn, read_calls, weather

ASKED = Sample("tool", "en", (user("What is 12*34?"),), "408", tools=(CALCULATOR, WEATHER))


def test_a_call_is_run_and_its_result_follows_it() -> None:
    later = next_turn(ASKED, [ToolCall("calculator", {"expression": "12*34"})], reasoning="I use it.")
    assert later is not None
    asked, called, answered = later.messages
    assert asked == ASKED.messages[0]
    assert called["tool_calls"][0]["function"] == {"name": "calculator", "arguments": '{"expression": "12*34"}'}
    assert called["reasoning_content"] == "I use it."
    assert (answered["role"], answered["content"]) == ("tool", "408")
    assert answered["tool_call_id"] == called["tool_calls"][0]["id"]
    assert later.tool_call is None


@pytest.mark.parametrize(
    "call",
    [
        ToolCall("abacus", {}),
        ToolCall("image_zoom_in_tool", {"bbox_2d": [0, 0, 500, 500]}),
        ToolCall("calculator", {}),
        ToolCall("calculator", {"expression": 12}),
        ToolCall("calculator", {"expression": [1]}),
        ToolCall("calculator", {"expression": "twelve"}),
    ],
)
def test_calls_that_cannot_be_run_end_the_conversation(call: ToolCall) -> None:
    assert next_turn(ASKED, [call]) is None
    assert next_turn(ASKED, []) is None


def test_without_a_picture_there_is_nothing_to_zoom_into() -> None:
    blind = Sample("zoom", "en", (user("What is on the sign?"),), "7", tools=(ZOOM,))
    assert next_turn(blind, [ToolCall("image_zoom_in_tool", {"bbox_2d": [0, 0, 500, 500]})]) is None


def test_zooming_crops_the_first_picture() -> None:
    image = Image.new("RGB", (400, 200))
    image.paste((255, 0, 0), (100, 50, 200, 100))
    sample = Sample("zoom", "en", (user(Picture(image), "Read it."),), "7", tools=(ZOOM,))
    later = next_turn(sample, [ToolCall("image_zoom_in_tool", {"bbox_2d": [250, 250, 500, 500]})])
    assert later is not None
    seen = later.pictures[1].image
    assert seen.size == (100, 50)
    assert seen.getcolors() == [(5000, (255, 0, 0))]


@pytest.mark.parametrize("bbox", [[0, 0, 0, 0], [500, 500, 100, 100], [1, 2, 3], [0, 0, 1, "a"]])
def test_an_empty_region_is_refused(bbox: list[float]) -> None:
    with pytest.raises(ValueError, match="bbox_2d"):
        crop(Picture(Image.new("RGB", (100, 100))), bbox)


def test_arguments_that_are_no_object_become_empty() -> None:
    calls = read_calls([("a", '{"x": 1}'), ("b", "[1]"), ("c", "{")])
    assert [dict(c.arguments) for c in calls] == [{"x": 1}, {}, {}]


def test_the_weather_of_a_city_never_changes() -> None:
    assert weather("Oslo") == weather("Oslo") != weather("Cairo")
    assert json.dumps(weather("Oslo"))
