"""Functions that samples offer to the model, what they do when it calls them, and questions that need them."""

from __future__ import annotations

import ast
import json
import operator
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ernie_cluster.skills import phrases
from ernie_cluster.skills.looking import Question
from ernie_cluster.skills.reading import Sum, typed_form
from ernie_cluster.skills.sample import Box, Picture, Sample, ToolCall, content
from ernie_cluster.skills.words import spoken

Tool = Mapping[str, Any]


def function(name: str, description: str, properties: Mapping[str, Any], required: Sequence[str]) -> Tool:
    """An OpenAI-shaped definition."""
    parameters = {"type": "object", "properties": dict(properties), "required": list(required)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


CALCULATOR = function(
    "calculator",
    "Evaluates an arithmetic expression.",
    {"expression": {"type": "string", "description": "For example 12*34."}},
    ["expression"],
)
ZOOM = function(
    "image_zoom_in_tool",
    "Zooms into a region of the image by cropping it, to see more.",
    {
        "bbox_2d": {
            "type": "array",
            "items": {"type": "number"},
            "minItems": 4,
            "maxItems": 4,
            "description": "The region [x1, y1, x2, y2], in 0-1000 of the width and height.",
        },
        "label": {"type": "string", "description": "The name of the object."},
    },
    ["bbox_2d"],
)
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

_SIGNS: Mapping[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def calculate(expression: str) -> str:
    """The value of a sum, difference, product or quotient of numbers; whole ones without a point.

    Raises:
        ValueError: anything else, or a division by zero.
    """
    if not isinstance(expression, str) or len(expression) > 200:
        raise ValueError("an expression is a text of at most 200 characters")
    try:
        value = _value(ast.parse(expression.replace("×", "*"), mode="eval").body)
        return str(int(value)) if value == int(value) else str(value)
    except (SyntaxError, ArithmeticError, RecursionError, MemoryError) as e:
        raise ValueError(f"{expression!r} cannot be evaluated: {e}") from None


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.BinOp) and type(node.op) in _SIGNS:
        return _SIGNS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        return node.value
    raise ValueError("only numbers, + - * / and brackets are evaluated")


def crop(picture: Picture, bbox_2d: Sequence[float]) -> Picture:
    """The region of a picture; `bbox_2d` in thousandths of its sides.

    Raises:
        ValueError: not four numbers, or an empty region.
    """
    if len(bbox_2d) != 4 or not all(isinstance(v, (int, float)) for v in bbox_2d):
        raise ValueError(f"bbox_2d {list(bbox_2d)} is not four numbers")
    width, height = picture.image.size
    x0, y0, x1, y1 = (min(1000.0, max(0.0, v)) / 1000 for v in bbox_2d)
    box = (int(x0 * width), int(y0 * height), round(x1 * width), round(y1 * height))
    if box[2] - box[0] < 2 or box[3] - box[1] < 2:
        raise ValueError(f"bbox_2d {list(bbox_2d)} holds no pixels")
    return Picture(picture.image.crop(box))


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
    encoded = json.dumps(dict(call.arguments), ensure_ascii=False)
    wire_call = {"id": "call-1", "type": "function", "function": {"name": call.name, "arguments": encoded}}
    assistant = {"role": "assistant", "content": "", "tool_calls": [wire_call]}
    if reasoning:
        assistant["reasoning_content"] = reasoning
    tool = {"role": "tool", "tool_call_id": "call-1", "content": result}
    thought = "I have the result." if sample.reasoning else ""
    messages = (*sample.messages, assistant, tool)
    return replace(sample, messages=messages, tool_call=None, target=None, reasoning=thought)


def run(sample: Sample, call: ToolCall) -> str | list[dict[str, Any]]:
    """Content of the tool's message.

    Raises:
        ValueError, KeyError, TypeError: no such tool, or arguments that it cannot take.
    """
    if call.name not in {tool["function"]["name"] for tool in sample.tools}:
        raise ValueError(f"no tool {call.name!r} is offered")
    if call.name == "calculator":
        return calculate(call.arguments["expression"])
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


def zoom_call(rng: random.Random, target: Box) -> ToolCall:
    """Frames the target with a margin, not always the same one."""
    x0, y0, x1, y1 = target
    dx, dy = (x1 - x0) * rng.uniform(0.3, 0.4), (y1 - y0) * rng.uniform(0.5, 0.7)
    box = (x0 - dx, y0 - dy, x1 + dx, y1 + dy)
    return ToolCall(
        "image_zoom_in_tool", {"bbox_2d": [round(1000 * min(1.0, max(0.0, v))) for v in box], "label": "sign"}
    )


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
