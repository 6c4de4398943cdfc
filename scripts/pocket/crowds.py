"""Pictures for the eyes alone: as many shapes or characters as there is room for, so that each teaches a lot."""

from __future__ import annotations

import random

from ernie_cluster.skills.catalog import HELD_OUT
from ernie_cluster.skills.glyphs import draw_text
from ernie_cluster.skills.paint import worn
from ernie_cluster.skills.reading import draw_number, sign_size
from ernie_cluster.skills.sample import Box, Picture, Thing
from ernie_cluster.skills.scene import Backdrop, backdrop, canvas_size, draw_scene, random_kind
from ernie_cluster.skills.words import COLOURS, WORDS

_CONTRAST = 260.0
"""As where single numbers are written."""


def draw_crowd(seed: int) -> Picture:
    """A full picture; the same for the same seed."""
    assert 0 <= seed < HELD_OUT, f"seed {seed} is for evaluation"
    rng = random.Random(f"crowd:{seed}")
    return _shapes(rng) if rng.random() < 0.4 else _lines(rng)


def _shapes(rng: random.Random) -> Picture:
    """One shape per cell of a grid, here and there none."""
    size = canvas_size(rng)
    drop = backdrop(rng, size)
    cell = rng.uniform(24, 64)
    columns, rows = max(1, int(size[0] / cell)), max(1, int(size[1] / cell))
    boxes: list[Box] = []
    for row in range(rows):
        for column in range(columns):
            if rng.random() < 0.15 and boxes:
                continue
            width, height = size[0] / columns, size[1] / rows
            side = min(width, height) * rng.uniform(0.65, 1.0)
            x, y = column * width + rng.uniform(0, width - side), row * height + rng.uniform(0, height - side)
            boxes.append((x, y, x + side, y + side))
    picture = draw_scene(rng, drop, [random_kind(rng, drop) for _ in boxes], boxes, is_worn=False)
    signs = _signs(rng, picture, drop) if rng.random() < 0.4 else ()
    return Picture(worn(rng, picture.image), (*picture.things, *signs))


def _signs(rng: random.Random, picture: Picture, drop: Backdrop) -> list[Thing]:
    """A few numbers between the shapes, as small as those on large pictures that are shrunk."""
    out: list[Thing] = []
    for _ in range(8):
        number, height = str(rng.randint(10, 9999)), rng.uniform(6.5, 9.0)
        width, tall = sign_size(rng, number, height)
        if width > picture.image.width - 2:
            continue
        x, y = rng.uniform(1, picture.image.width - width - 1), rng.uniform(1, picture.image.height - tall - 1)
        box = (x, y, x + width, y + tall)
        if not any(_meet(box, thing.box) for thing in (*picture.things, *out)):
            out.append(draw_number(rng, picture.image, drop, number, box, height))
    return out


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _lines(rng: random.Random) -> Picture:
    """Lines of digits, sums or letters, each in a font and a colour of its own."""
    size = canvas_size(rng)
    drop = backdrop(rng, size)
    colours = [c for c in COLOURS if drop.is_seen(c, _CONTRAST)]
    things: list[Thing] = []
    top = 2.0
    while True:
        height = rng.choice((rng.uniform(13, 22), rng.uniform(15, 40)))
        room = height * 1.45
        if top + room > size[1] and things:
            return Picture(worn(rng, drop.image), tuple(things))
        text = _text(rng, max(1, int(size[0] / (height * 0.95))))
        centre = (size[0] / 2 + rng.uniform(-4, 4), top + room / 2)
        ink = COLOURS[rng.choice(colours)][0]
        things += draw_text(
            rng, drop.image, text, ink, centre, height, max_width=size[0] - 12, is_upright=rng.random() < 0.5
        )
        top += room


def _text(rng: random.Random, length: int) -> str:
    if rng.random() < 0.3:
        words = "".join(rng.choice((str.lower, str.upper, str.title))(rng.choice(WORDS)) for _ in range(6))
        return words[:length]
    letters = "0123456789" if rng.random() < 0.7 else "0123456789+-×="
    return "".join(rng.choice(letters) for _ in range(length))
