"""Functions that samples offer to the model, what they do when it calls them, and questions that need them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ernie_cluster.builtin import calculator, zoom
from ernie_cluster.builtin.base import Definition, function
from ernie_cluster.builtin.pictures import pixel_box, read_region
from ernie_cluster.builtin.turns import Called, turn_of
from ernie_cluster.skills import phrases
from ernie_cluster.skills.looking import Question, bbox_2d
from ernie_cluster.skills.reading import Sum, typed_form
from ernie_cluster.skills.sample import Box, Picture, Sample, ToolCall, content
from ernie_cluster.skills.words import spoken

Tool = Definition

CALCULATOR, ZOOM = calculator.CALCULATOR, zoom.ZOOM
"""Servers may run these two themselves: samples offer the very same."""

_REGION = 0.32
"""Share of either side that samples zoom into."""

WEATHER = function("get_weather", "Tells the weather in a city.", {"city": {"type": "string"}}, ["city"])

CITIES = (
    "Paris", "London", "Berlin", "Rome", "Madrid", "Tokyo", "Beijing", "Shanghai", "New York", "Boston", "Vienna",
    "Prague", "Oslo", "Cairo", "Delhi", "Sydney", "Moscow", "Dublin", "Lisbon", "Zurich",
)  # fmt: skip
_WEATHER_PHRASES = (
    "What is the weather in {city}?",
    "How is the weather in {city}?",
    "Weather in {city}?",
    "Tell me the weather in {city}.",
    "What's the weather like in {city} today?",
    "Is it cold in {city}?",
    "Will it rain in {city}?",
    "Please check the weather in {city}.",
)
_SKIES = ("sunny", "cloudy", "rain", "snow", "fog", "wind")


def crop(picture: Picture, bbox_2d: Sequence[float]) -> Picture:
    """The region of a picture; `bbox_2d` in thousandths of its sides.

    Raises:
        ValueError: not four numbers, or an empty region.
    """
    return Picture(picture.image.crop(pixel_box(read_region(bbox_2d), picture.image.size)))


def next_turn(sample: Sample, calls: Sequence[ToolCall], *, reasoning: str = "") -> Sample | None:
    """The conversation after the model's calls were run, waiting for the answer.

    Args:
        sample: the conversation in which they were made.
        calls: what the model called; only the first is run.
        reasoning: what it thought before, if that is to stand in the conversation.

    Returns:
        A sample that asks for no further call. None when there is no call, or it cannot be run.
    """
    if not calls:
        return None
    call = calls[0]
    try:
        result = run(sample, call)
    except (ValueError, KeyError, TypeError):
        return None
    called = Called("call-1", call.name, json.dumps(dict(call.arguments), ensure_ascii=False))
    thought = "I have the result." if sample.reasoning else ""
    messages = (*sample.messages, *turn_of([called], [result], reasoning=reasoning))
    return replace(sample, messages=messages, tool_call=None, target=None, reasoning=thought)


def run(sample: Sample, call: ToolCall) -> str | list[dict[str, Any]]:
    """Content of the tool's message.

    Raises:
        ValueError, KeyError, TypeError: no such tool, or arguments that it cannot take.
    """
    if call.name not in {tool["function"]["name"] for tool in sample.tools}:
        raise ValueError(f"no tool {call.name!r} is offered")
    if call.name == "calculator":
        return calculator.calculate(call.arguments["expression"])
    if call.name == "image_zoom_in_tool":
        if not sample.pictures:
            raise ValueError("there is no picture to zoom into")
        return content(crop(sample.pictures[0], call.arguments["bbox_2d"]))
    return weather(call.arguments["city"])


def weather(city: str) -> str:
    """Made up, and always the same for a city."""
    rng = random.Random(city)
    return f"{rng.randint(-9, 35)} degrees, {rng.choice(_SKIES)}"


def hard_sum(rng: random.Random) -> Sum:
    """One that is too long for the head."""
    sign = rng.choice("+-×")
    if sign == "×":
        return Sum(rng.randint(100, 999), sign, rng.randint(12, 999))
    a, b = rng.randint(200, 9999), rng.randint(200, 9999)
    return Sum(max(a, b), sign, min(a, b)) if sign == "-" else Sum(a, sign, b)


def ask_hard_sum(rng: random.Random, total: Sum, *, is_drawn: bool) -> tuple[Question, ToolCall]:
    """A question, and the call that it needs."""
    pattern = phrases.SUM_DRAWN["en"] if is_drawn else phrases.SUM_TYPED["en"]
    text = rng.choice(pattern).format(sum=typed_form(rng, total.text))
    text = text if text[0].isdigit() else spoken(rng, text, "en")
    call = ToolCall("calculator", {"expression": total.text.replace("×", "*")})
    return Question(text, str(total.result), "I use the calculator."), call


def ask_weather(rng: random.Random) -> tuple[Question, ToolCall]:
    """A question, and the call that it needs."""
    city = rng.choice(CITIES)
    text = rng.choice(_WEATHER_PHRASES).format(city=city)
    return Question(text, weather(city), "I look up the weather."), ToolCall("get_weather", {"city": city})


def zoom_call(target: Box, shift: tuple[float, float] = (0.0, 0.0)) -> ToolCall:
    """Frames a small target with much around it: a region of one size, within the picture.

    Args:
        shift: fractions of the sides by which the region lies beside the target's middle.
    """
    x0, y0, x1, y1 = target
    middles = ((x0 + x1) / 2 + shift[0], (y0 + y1) / 2 + shift[1])
    left, top = (min(max(0.0, middle - _REGION / 2), 1 - _REGION) for middle in middles)
    box = bbox_2d((left, top, left + _REGION, top + _REGION))
    return ToolCall("image_zoom_in_tool", {"bbox_2d": box, "label": "sign"})


def read_calls(calls: Sequence[tuple[str, str]]) -> list[ToolCall]:
    """Calls of a reply, as (name, arguments in JSON); arguments that are no object become {}."""
    out = []
    for name, arguments in calls:
        try:
            parsed = json.loads(arguments)
        except ValueError:
            parsed = {}
        out.append(ToolCall(name, parsed if isinstance(parsed, dict) else {}))
    return out
