"""Pictures that the packaged model reads right, and how they are asked about: large, plain, drawn as its lessons are."""

from __future__ import annotations

import json
import random
from functools import cache
from typing import Any

from PIL import Image

from ernie_cluster.skills.glyphs import draw_text
from ernie_cluster.skills.paint import draw_shape
from ernie_cluster.skills.sample import Clip, Picture
from ernie_cluster.skills.scene import Backdrop, draw_scene
from ernie_cluster.skills.tools import WEATHER, weather
from ernie_cluster.skills.words import COLOURS

MODEL = "ernie-pocket"

ASK_COLOUR = "What colour is the circle?"
ASK_NUMBER = "Read the number."
ASK_MOTION = "Which way does the circle move?"
ASK_SUM = "What is the result?"
ASK_WEATHER = "What is the weather in Paris?"

NUMBER = "427"
SUM = "12+5"
CITY = "Paris"
WEATHER_THERE = weather(CITY)
TOOL = dict(WEATHER)
"""A function of the client's, which the model was taught to call when it is asked for the weather."""

_PAPER = (250, 247, 238)


@cache
def circle(colour: str = "red") -> str:
    """One circle, as a data URL."""
    drop = Backdrop(Image.new("RGB", (140, 112), _PAPER), _PAPER)
    picture = draw_scene(random.Random(0), drop, [(colour, "circle")], [(34, 20, 106, 92)], is_worn=False)
    return picture.data_url()


@cache
def written(text: str) -> str:
    """Writing in blue, as a data URL."""
    image = Image.new("RGB", (168, 112), _PAPER)
    draw_text(random.Random(0), image, text, COLOURS["blue"][0], (84, 56), 46, max_width=150, is_upright=True)
    return Picture(image).data_url()


@cache
def moving() -> str:
    """A red circle that goes from left to right, as a data URL of its frames."""
    frames = []
    for i in range(6):
        image = Image.new("RGB", (126, 98), _PAPER)
        draw_shape(random.Random(0), image, "circle", COLOURS["red"][0], (22 + 16 * i, 49), 34)
        frames.append(image)
    return Clip(tuple(frames)).data_url()


def as_json() -> str:
    """What clients in other languages show and ask."""
    return json.dumps(
        {
            "model": MODEL,
            "circle": circle(),
            "askColour": ASK_COLOUR,
            "sum": written(SUM),
            "askSum": ASK_SUM,
            "askWeather": ASK_WEATHER,
            "city": CITY,
            "weather": WEATHER_THERE,
            "tool": TOOL["function"],
        }
    )


def user(text: str, *, image: str | None = None, video: str | None = None) -> Any:
    """One message of OpenAI's, in a list."""
    shown = [
        {"type": f"{kind}_url", f"{kind}_url": {"url": url}}
        for kind, url in (("image", image), ("video", video))
        if url is not None
    ]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}] if shown else text}]
