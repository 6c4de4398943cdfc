"""Questions about a scene of shapes: colour, shape, count, describe, ground, and comparing two pictures."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ernie_cluster.skills import phrases
from ernie_cluster.skills.sample import Box, Language, Picture, Thing
from ernie_cluster.skills.scene import backdrop, canvas_size, draw_scene, place, random_kind, random_scene
from ernie_cluster.skills.words import NUMERALS, SHAPES, colour_name, plural, shape_name, spoken, with_article


@dataclass(frozen=True, slots=True)
class Question:
    """Words about a picture that stands before or after them."""

    text: str
    answer: str
    reasoning: str
    target: Box | None = None
    """As in `Sample`."""


Ask = Callable[[random.Random, Picture, Language], Question | None]
"""Poses a question about a scene; None where the scene leaves it without a single right answer."""


def ask_colour(rng: random.Random, picture: Picture, language: Language) -> Question | None:
    thing = _unique(rng, picture, lambda t: t.name)
    if thing is None:
        return None
    shape, colour = shape_name(thing.name, language), colour_name(thing.colour, language)
    is_alone = len(picture.things) == 1 and rng.random() < 0.5
    text = rng.choice((phrases.COLOUR_OF_ALL if is_alone else phrases.COLOUR)[language]).format(shape=shape)
    reasoning = f"I look for the {shape}. It is {colour}." if language == "en" else f"找到{shape}，它是{colour}。"
    return Question(spoken(rng, text, language), colour, reasoning)


def ask_shape(rng: random.Random, picture: Picture, language: Language) -> Question | None:
    thing = _unique(rng, picture, lambda t: t.colour)
    if thing is None:
        return None
    shape, colour = shape_name(thing.name, language), colour_name(thing.colour, language)
    is_alone = len(picture.things) == 1 and rng.random() < 0.5
    text = rng.choice((phrases.SHAPE_OF_ALL if is_alone else phrases.SHAPE)[language]).format(colour=colour)
    reasoning = f"I look for {colour}. It is a {shape}." if language == "en" else f"找到{colour}的物体，它是{shape}。"
    return Question(spoken(rng, text, language), shape, reasoning)


def ask_count(rng: random.Random, picture: Picture, language: Language) -> Question | None:
    colour, shape = _counted_kind(rng, picture)
    number = sum(colour in ("", t.colour) and shape in ("", t.name) for t in picture.things)
    if language == "en":
        noun = plural(shape) if shape else rng.choice(("objects", "shapes", "things"))
        things = f"{colour} {noun}" if colour else noun
        if colour and not shape and rng.random() < 0.2:
            things = f"{colour} ones"
    else:
        noun = SHAPES[shape] if shape else rng.choice(("物体", "图形"))
        things = f"{colour_name(colour, language)}的{noun}" if colour else noun
    text = rng.choice(phrases.COUNT[language]).format(things=things)
    listed = ", ".join(map(str, range(1, number + 1))) or "0"
    reasoning = f"I count the {things}: {listed}." if language == "en" else f"数{things}：{listed}。"
    return Question(spoken(rng, text, language), str(number), reasoning)


def _counted_kind(rng: random.Random, picture: Picture) -> tuple[str, str]:
    """What to count, as (colour, shape), "" for any; at times what is not there."""
    kind = rng.random()
    if kind < 0.45:
        return "", ""
    thing = rng.choice(picture.things)
    if kind < 0.5:
        thing = Thing(rng.choice(list(SHAPES)), thing.colour, thing.box)
    which = rng.randrange(3)
    return ("" if which == 0 else thing.colour), ("" if which == 1 else thing.name)


def ask_describe(rng: random.Random, picture: Picture, language: Language) -> Question | None:
    text = spoken(rng, rng.choice(phrases.DESCRIBE[language]), language)
    things = sorted(picture.things, key=lambda t: t.box[0] + t.box[2])
    reasoning = "I name the shapes from left to right." if language == "en" else "从左到右说出图形。"
    return Question(text, (_describe_en if language == "en" else _describe_zh)(things), reasoning)


def _describe_en(things: list[Thing]) -> str:
    kinds = Counter((t.colour, t.name) for t in things)
    if len(kinds) == 1 and len(things) > 1:
        return f"{NUMERALS[len(things)]} {things[0].colour} {plural(things[0].name)}.".capitalize()
    if len(things) > 3:
        return f"{NUMERALS[len(things)]} shapes.".capitalize()
    nouns = [with_article(f"{t.colour} {t.name}") for t in things]
    return (", ".join(nouns[:-1]) + " and " + nouns[-1] if len(nouns) > 1 else nouns[0]).capitalize() + "."


def _describe_zh(things: list[Thing]) -> str:
    kinds = Counter((t.colour, t.name) for t in things)
    if len(kinds) == 1:
        return f"{len(things)}个{colour_name(things[0].colour, 'zh')}的{SHAPES[things[0].name]}。"
    if len(things) > 3:
        return f"{len(things)}个图形。"
    nouns = [f"1个{colour_name(t.colour, 'zh')}的{SHAPES[t.name]}" for t in things]
    return "、".join(nouns[:-1]) + "和" + nouns[-1] + "。"


def ask_ground(rng: random.Random, picture: Picture, language: Language) -> Question | None:
    """Always in English: its answer is a form for programs."""
    thing = _unique(rng, picture, lambda t: f"{t.colour} {t.name}")
    if thing is None:
        return None
    label = f"{thing.colour} {thing.name}"
    same = sum(t.name == thing.name for t in picture.things)
    name = thing.name if same == 1 and rng.random() < 0.3 else label
    box = fractions(thing.box, picture)
    answer = json.dumps({"bbox_2d": bbox_2d(box), "label": label}, separators=(",", ":"))
    text = spoken(rng, rng.choice(phrases.GROUND["en"]).format(thing=name), "en")
    return Question(text, answer, f"I look for the {name}.", box)


ASK: Mapping[str, Ask] = {
    "colour": ask_colour,
    "shape": ask_shape,
    "count": ask_count,
    "describe": ask_describe,
    "ground": ask_ground,
}


def _unique(rng: random.Random, picture: Picture, key: Callable[[Thing], str]) -> Thing | None:
    """One of the things whose key no other thing shares."""
    counts = Counter(map(key, picture.things))
    single = [t for t in picture.things if counts[key(t)] == 1]
    return rng.choice(single) if single else None


def fractions(box: Box, picture: Picture) -> Box:
    """The box over the picture's sides, within [0, 1]."""
    width, height = picture.image.size
    x0, y0, x1, y1 = (min(1.0, max(0.0, v / side)) for v, side in zip(box, (width, height) * 2, strict=True))
    return x0, y0, x1, y1


def bbox_2d(box: Box) -> list[int]:
    """A box of fractions in thousandths, to the nearest hundredth: pictures of 12 by 12 patches show no more."""
    return [10 * round(100 * v) for v in box]


def look(rng: random.Random, skill: str) -> Picture:
    """A scene that suits questions of `skill`."""
    if skill == "count":
        return random_scene(rng, rng.randint(1, 9))
    return random_scene(rng, rng.choice((1, 2, 2, 3, 3, 4, 5)) if skill != "describe" else rng.randint(1, 4))


def compare(rng: random.Random) -> tuple[tuple[Picture, Picture], Question]:
    """Two pictures, and which of them it is."""
    kind, winner = rng.choice(list(phrases.COMPARE)), rng.randrange(2)
    shape, pair = {"larger": _larger, "more": _more, "with": _with}[kind](rng)
    pictures = pair if winner == 0 else (pair[1], pair[0])
    text = spoken(rng, rng.choice(phrases.COMPARE[kind]).format(shape=shape), "en")
    return pictures, Question(text, f"Picture {winner + 1}", "I compare the two pictures.")


Pair = tuple[str, tuple[Picture, Picture]]
"""A shape, and two pictures, the right one first."""


def _larger(rng: random.Random) -> Pair:
    shape = rng.choice(list(SHAPES))
    small = rng.uniform(24, 55)
    pictures = []
    for side in (small * rng.uniform(1.5, 2.2), small):
        size = canvas_size(rng, 104, 144)
        drop = backdrop(rng, size)
        boxes = place(rng, size, 1, side, side)
        pictures.append(draw_scene(rng, drop, [(random_kind(rng, drop)[0], shape)], boxes))
    return shape, (pictures[0], pictures[1])


def _more(rng: random.Random) -> Pair:
    few = rng.randint(1, 4)
    many = rng.randint(few + 2, 7)
    return "", (random_scene(rng, many), random_scene(rng, few))


def _with(rng: random.Random) -> Pair:
    shape = rng.choice(list(SHAPES))
    others = [s for s in SHAPES if s != shape]
    pictures = []
    for has_it in (True, False):
        size = canvas_size(rng, 104, 144)
        drop = backdrop(rng, size)
        kinds = [(random_kind(rng, drop)[0], rng.choice(others)) for _ in range(rng.randint(1, 3))]
        if has_it:
            kinds[0] = (kinds[0][0], shape)
        pictures.append(draw_scene(rng, drop, kinds, place(rng, size, len(kinds), 26, 0.45 * min(size))))
    return shape, (pictures[0], pictures[1])
