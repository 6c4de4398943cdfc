"""Pictures of several shapes that do not touch, each told from the background."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image

from ernie_cluster.skills.paint import Colour, background, background_colour, distance, draw_shape, shaded, worn
from ernie_cluster.skills.sample import Box, Picture, Thing
from ernie_cluster.skills.words import COLOURS, SHAPES

Kind = tuple[str, str]
"""(colour, shape)."""

_CONTRAST = 190.0
"""Least `distance` of a shape's colour from the background."""


@dataclass(frozen=True, slots=True)
class Backdrop:
    """An empty picture and the colour around which it varies."""

    image: Image.Image
    colour: Colour

    def is_seen(self, colour: str, contrast: float = _CONTRAST) -> bool:
        """Whether that colour stands out."""
        return distance(COLOURS[colour][0], self.colour) >= contrast


def canvas_size(rng: random.Random, low: int = 104, high: int = 176) -> tuple[int, int]:
    """Width and height of a picture, smaller ones more often; sides of at most 1 : 2."""
    width = round(low + (high - low) * rng.random() ** 1.3)
    height = round(low + (high - low) * rng.random() ** 1.3)
    return max(width, height // 2), max(height, width // 2)


def backdrop(rng: random.Random, size: tuple[int, int]) -> Backdrop:
    colour = background_colour(rng)
    return Backdrop(background(rng, size, colour), colour)


def random_kind(rng: random.Random, drop: Backdrop) -> Kind:
    """Any shape in any colour that is seen on the backdrop."""
    return rng.choice([c for c in COLOURS if drop.is_seen(c)]), rng.choice(list(SHAPES))


def random_kinds(rng: random.Random, drop: Backdrop, count: int) -> list[Kind]:
    """Kinds of `count` shapes; the more shapes, the more of them are alike."""
    if count <= 4 and rng.random() < 0.6:
        return [random_kind(rng, drop) for _ in range(count)]
    few = [random_kind(rng, drop) for _ in range(rng.randint(1, min(count, 3)))]
    colours, shapes = [c for c, _ in few], [s for _, s in few]
    return [(rng.choice(colours), rng.choice(shapes)) for _ in range(count)]


def place(rng: random.Random, size: tuple[int, int], count: int, low: float, high: float) -> list[Box]:
    """Squares that do not overlap, with sides from `low` to `high` pixels where there is room.

    Sides shrink as far as needed, so that there are always `count`.
    """
    width, height = size
    high = min(high, 0.75 * min(size))
    while True:
        boxes: list[Box] = []
        for _ in range(60 * count):
            side = rng.uniform(min(low, high), high)
            x, y = rng.uniform(1, width - side - 1), rng.uniform(1, height - side - 1)
            box = (x, y, x + side, y + side)
            if not any(_overlap(box, other, margin=3) for other in boxes):
                boxes.append(box)
                if len(boxes) == count:
                    return boxes
        low, high = low * 0.9, high * 0.8


def _overlap(a: Box, b: Box, margin: float) -> bool:
    return not (
        a[2] + margin <= b[0] or b[2] + margin <= a[0] or a[3] + margin <= b[1] or b[3] + margin <= a[1]
    )  # fmt: skip


def draw_scene(
    rng: random.Random, drop: Backdrop, kinds: list[Kind], boxes: list[Box], *, is_worn: bool = True
) -> Picture:
    """One shape per box, drawn onto a copy of the backdrop."""
    image = drop.image.copy()
    things = []
    for (colour, shape), (x0, y0, x1, y1) in zip(kinds, boxes, strict=True):
        centre, size = ((x0 + x1) / 2, (y0 + y1) / 2), (x1 - x0) * 0.9
        things.append(Thing(shape, colour, draw_shape(rng, image, shape, _shade(rng, colour), centre, size)))
    return Picture(worn(rng, image) if is_worn else image, tuple(things))


def _shade(rng: random.Random, colour: str) -> Colour:
    return shaded(rng, COLOURS[colour][0], 14)


def random_scene(rng: random.Random, count: int) -> Picture:
    """A picture of `count` shapes; one alone may be large."""
    size = canvas_size(rng)
    drop = backdrop(rng, size)
    kinds = random_kinds(rng, drop, count)
    largest = (0.75 if count == 1 else 0.55 if count <= 3 else 0.35) * min(size)
    return draw_scene(rng, drop, kinds, place(rng, size, count, 19, largest))
