"""Names of what is drawn, and how people ask about it, in English and Chinese."""

from __future__ import annotations

import random
from collections.abc import Mapping

from ernie_cluster.skills.sample import Language

COLOURS: Mapping[str, tuple[tuple[int, int, int], str]] = {
    "red": ((220, 30, 35), "红色"),
    "orange": ((250, 135, 20), "橙色"),
    "yellow": ((245, 220, 35), "黄色"),
    "green": ((35, 150, 60), "绿色"),
    "blue": ((35, 75, 215), "蓝色"),
    "purple": ((125, 40, 160), "紫色"),
    "pink": ((250, 140, 185), "粉色"),
    "brown": ((120, 72, 35), "棕色"),
    "black": ((15, 15, 18), "黑色"),
    "white": ((248, 248, 246), "白色"),
}
"""Name -> RGB, Chinese name."""

SHAPES: Mapping[str, str] = {
    "circle": "圆形",
    "square": "正方形",
    "triangle": "三角形",
    "star": "星形",
    "heart": "心形",
    "diamond": "菱形",
    "cross": "十字形",
    "ring": "圆环",
}
"""Name -> Chinese name."""

PLURALS: Mapping[str, str] = {"cross": "crosses"}

WORDS = """
stop open exit taxi bus cafe bank hotel shop sale push pull hello yes no up left right go food tea milk fire help
park zoo book red blue cat dog fish bird tree sun moon star day night city road east west north south home ice hot cold
new old big ok pay fun win wait slow fast one two ten map car bike train bread rice apple lemon water juice music game
""".split()  # noqa: SIM905 (readable)

NUMERALS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def colour_name(colour: str, language: Language) -> str:
    return colour if language == "en" else COLOURS[colour][1]


def shape_name(shape: str, language: Language) -> str:
    return shape if language == "en" else SHAPES[shape]


def plural(shape: str) -> str:
    return PLURALS.get(shape, shape + "s")


def with_article(noun: str) -> str:
    """ "a red circle", "an orange star"."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def spoken(rng: random.Random, text: str, language: Language) -> str:
    """The question as somebody types it: at times without capitals, without the mark at the end, or with a typo."""
    if rng.random() < 0.25:
        text = text.rstrip("?.!？。！")
    if language == "zh":
        return text
    if rng.random() < 0.3:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.08:
        text = _typo(rng, text)
    return text


def _typo(rng: random.Random, text: str) -> str:
    """Two neighbours swapped, a letter lost or doubled; digits stay."""
    places = [i for i in range(1, len(text) - 1) if text[i].isalpha() and text[i + 1].isalpha()]
    if not places:
        return text
    i = rng.choice(places)
    kind = rng.randrange(3)
    if kind == 0:
        return text[:i] + text[i + 1] + text[i] + text[i + 2 :]
    return text[:i] + text[i + 1 :] if kind == 1 else text[:i] + text[i] + text[i:]
