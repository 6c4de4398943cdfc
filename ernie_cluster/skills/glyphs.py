"""Writes text into pictures: Pillow's two built-in fonts, seven segments, and strokes as of a pen.

No font files of the machine are used, so that every machine draws alike.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

from PIL import Image, ImageDraw, ImageFont

from ernie_cluster.skills.paint import Colour
from ernie_cluster.skills.sample import Thing

Span = tuple[str, float, float]
"""A character and where it begins and ends along its line, pixels."""


def draw_text(
    rng: random.Random,
    image: Image.Image,
    text: str,
    colour: Colour,
    centre: tuple[float, float],
    height: float,
    *,
    max_width: float,
    is_upright: bool = False,
) -> tuple[Thing, ...]:
    """Write one line, perhaps turned and slanted, in a font that has all its characters.

    Args:
        centre: of the line, pixels.
        height: of a digit or capital letter, pixels; smaller where the line would be wider than `max_width`.
        is_upright: neither turned nor slanted.

    Returns:
        A thing per character, spaces left out.
    """
    write = _writer(rng, text)
    mask, spans = write(text, height)
    if mask.width > max_width:
        height *= max_width / mask.width
        mask, spans = write(text, height)
    slant = 0.0 if is_upright or rng.random() < 0.6 else rng.uniform(-0.25, 0.25)
    turn = 0.0 if is_upright or rng.random() < 0.5 else rng.uniform(-0.2, 0.2)
    cos, sin = math.cos(turn), math.sin(turn)
    if slant or turn:
        mask = _turned(mask, slant, cos, sin)
    image.paste(colour, (round(centre[0] - mask.width / 2), round(centre[1] - mask.height / 2)), mask)
    middle = (spans[0][1] + spans[-1][2]) / 2
    things = []
    for character, start, end in spans:
        along, half = (start + end) / 2 - middle, (end - start) / 2
        x, y = centre[0] + along * cos, centre[1] + along * sin
        things.append(Thing(character, "", (x - half, y - 0.6 * height, x + half, y + 0.6 * height)))
    return tuple(t for t in things if t.name != " ")


def _turned(mask: Image.Image, slant: float, cos: float, sin: float) -> Image.Image:
    """Slanted, then turned about its middle; grown so that nothing is cut off."""
    width = math.ceil(mask.width * cos + mask.height * (abs(slant) + abs(sin))) + 2
    height = math.ceil(mask.height * (1 + abs(slant * sin)) + mask.width * abs(sin)) + 2
    a, b = cos - slant * sin, sin + slant * cos  # from a point of the result back to one of the mask
    c = mask.width / 2 - (a * width + b * height) / 2
    f = mask.height / 2 - (-sin * width + cos * height) / 2
    return mask.transform(
        (width, height), Image.Transform.AFFINE, (a, b, c, -sin, cos, f), Image.Resampling.BICUBIC
    )  # fmt: skip


Line = tuple[Image.Image, list[Span]]


_SPELLED = {"×": "x"}
"""What Pillow's fonts lack, and what stands for it there."""


class _Outline:
    """Pillow's outline font, at times bold."""

    CAPITAL = 0.7
    """Height of a capital letter over the font's size."""

    def __init__(self, rng: random.Random) -> None:
        self.weight, self.spacing = rng.choice((0.0, 0.0, 0.04, 0.08)), rng.choice((0.0, 0.0, 0.1, 0.25))

    def __call__(self, text: str, height: float) -> Line:
        size = height / self.CAPITAL
        font = ImageFont.load_default(size)
        stroke, gap = round(self.weight * size), self.spacing * height
        widths = [font.getlength(_SPELLED.get(character, character)) + gap + stroke for character in text]
        mask = Image.new("L", (math.ceil(sum(widths)) + 2 * stroke + 2, math.ceil(size * 1.3) + 2 * stroke))
        draw, x, spans = ImageDraw.Draw(mask), stroke + 1.0, []
        for character, width in zip(text, widths, strict=True):
            letter = _SPELLED.get(character, character)
            draw.text((x, mask.height / 2 + height / 2), letter, 255, font, "ls", stroke_width=stroke)
            spans.append((character, x, x + width - gap))
            x += width
        return mask, spans


class _Bitmap:
    """Pillow's bitmap font, enlarged with or without steps."""

    CAPITAL, CELL = 8, (6, 11)
    """Pixels: height of a capital letter, and a character's cell."""

    def __init__(self, rng: random.Random) -> None:
        self.resampling = rng.choice((Image.Resampling.NEAREST, Image.Resampling.BILINEAR))
        self.font = ImageFont.load_default_imagefont()

    def __call__(self, text: str, height: float) -> Line:
        scale = height / self.CAPITAL
        width, tall = self.CELL
        small = Image.new("1", (width * len(text), tall))
        ImageDraw.Draw(small).text((0, 0), "".join(_SPELLED.get(c, c) for c in text), 1, self.font)
        size = (max(1, round(small.width * scale)), max(1, round(tall * scale)))
        spans = [(c, i * width * scale, (i + 1) * width * scale) for i, c in enumerate(text)]
        return small.convert("L").resize(size, self.resampling), spans


Point = tuple[float, float]

_SEGMENTS: Mapping[str, tuple[Point, Point]] = {
    "a": ((0, 0), (1, 0)), "b": ((1, 0), (1, 1)), "c": ((1, 1), (1, 2)), "d": ((0, 2), (1, 2)),
    "e": ((0, 1), (0, 2)), "f": ((0, 0), (0, 1)), "g": ((0, 1), (1, 1)),
}  # fmt: skip
_SEVEN = ("abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgedc", "abc", "abcdefg", "abcdfg")
"""Lit segments of each digit."""

_PEN: Mapping[str, tuple[tuple[Point, ...], ...]] = {
    "0": (((0.5, 0), (0.1, 0.3), (0, 1), (0.1, 1.7), (0.5, 2), (0.9, 1.7), (1, 1), (0.9, 0.3), (0.5, 0)),),
    "1": (((0.2, 0.4), (0.55, 0), (0.55, 2)),),
    "2": (((0, 0.5), (0.25, 0.05), (0.7, 0), (1, 0.45), (0.9, 0.9), (0, 2), (1, 2)),),
    "3": (((0, 0.2), (0.5, 0), (0.95, 0.4), (0.8, 0.8), (0.4, 0.95), (0.9, 1.2), (1, 1.6), (0.5, 2), (0, 1.75)),),
    "4": (((0.75, 2), (0.75, 0), (0, 1.35), (1, 1.35)),),
    "5": (((0.95, 0), (0.15, 0), (0.05, 0.9), (0.6, 0.8), (1, 1.3), (0.85, 1.8), (0.4, 2), (0, 1.8)),),
    "6": (((0.85, 0), (0.3, 0.5), (0, 1.3), (0.2, 1.9), (0.7, 2), (1, 1.5), (0.75, 1.1), (0.3, 1.1), (0.05, 1.5)),),
    "7": (((0, 0), (1, 0), (0.4, 2)),),
    "8": (((0.5, 0.95), (0.1, 0.5), (0.5, 0), (0.9, 0.5), (0.5, 0.95), (0, 1.5), (0.5, 2), (1, 1.5), (0.5, 0.95)),),
    "9": (((0.95, 0.6), (0.5, 1), (0.05, 0.6), (0.3, 0.05), (0.75, 0), (0.95, 0.6), (0.8, 2)),),
    "+": (((0.5, 0.5), (0.5, 1.5)), ((0, 1), (1, 1))),
    "-": (((0.1, 1), (0.9, 1)),),
    "×": (((0.1, 0.6), (0.9, 1.4)), ((0.9, 0.6), (0.1, 1.4))),
    "=": (((0.05, 0.75), (0.95, 0.75)), ((0.05, 1.25), (0.95, 1.25))),
}  # fmt: skip
"""Lines of a pen in a box of 1 x 2."""


class _Strokes:
    """Characters made of lines: seven segments, or a pen's, which shakes a little."""

    FINE = 2
    """Drawn this many times larger and shrunk, so that edges are smooth."""

    def __init__(self, rng: random.Random, *, is_segments: bool) -> None:
        self.rng, self.is_segments = rng, is_segments
        self.shake = 0.0 if is_segments else 0.07
        self.thickness, self.spacing = rng.uniform(0.1, 0.17), rng.uniform(0.35, 0.6)

    def __call__(self, text: str, height: float) -> Line:
        unit = height / 2 * self.FINE
        thick = max(self.FINE, round(self.thickness * height * self.FINE))
        step = unit * 1.1 + self.spacing * unit + thick * 0.5
        mask = Image.new("L", (math.ceil(step * len(text)) + thick, math.ceil(2 * unit) + 2 * thick))
        draw, spans = ImageDraw.Draw(mask), []
        for i, character in enumerate(text):
            x = thick + i * step
            for line in self._lines(character):
                points = [(x + self._off(u) * unit * 1.1, thick + self._off(v) * unit) for u, v in line]
                draw.line(points, 255, thick, joint="curve")
                for u, v in (points[0], points[-1]):
                    draw.ellipse((u - thick / 2, v - thick / 2, u + thick / 2, v + thick / 2), 255)
            spans.append((character, x / self.FINE, (x + unit * 1.1) / self.FINE))
        size = (math.ceil(mask.width / self.FINE), math.ceil(mask.height / self.FINE))
        return mask.resize(size, Image.Resampling.BOX), spans

    def _lines(self, character: str) -> tuple[tuple[Point, ...], ...]:
        if self.is_segments and character.isdigit():
            return tuple(_SEGMENTS[s] for s in _SEVEN[int(character)])
        return _PEN[character]

    def _off(self, value: float) -> float:
        return value + self.rng.uniform(-self.shake, self.shake)


def _writer(rng: random.Random, text: str) -> _Outline | _Bitmap | _Strokes:
    """A font for this text: any for sums and numbers, one of Pillow's for letters."""
    kind = rng.random() * (1.0 if all(c in _PEN for c in text) else 0.65)
    if kind < 0.45:
        return _Outline(rng)
    if kind < 0.65:
        return _Bitmap(rng)
    return _Strokes(rng, is_segments=kind < 0.8)
