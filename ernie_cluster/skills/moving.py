"""Short videos: which way something moves, and which colour comes first or last."""

from __future__ import annotations

import random

from PIL import Image

from ernie_cluster.skills import phrases
from ernie_cluster.skills.looking import Question
from ernie_cluster.skills.paint import draw_shape, grainy, shaded
from ernie_cluster.skills.sample import Clip
from ernie_cluster.skills.scene import backdrop, random_kind
from ernie_cluster.skills.words import COLOURS, SHAPES, spoken

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def film_motion(rng: random.Random) -> tuple[Clip, Question]:
    """One shape crosses part of the picture."""
    size = (rng.randint(80, 128), rng.randint(80, 128))
    direction = rng.choice(list(DIRECTIONS))
    dx, dy = DIRECTIONS[direction]
    drop = backdrop(rng, size)
    colour, shape = random_kind(rng, drop)
    side = rng.uniform(22, 40)
    count = rng.randint(4, 8)
    middle = [rng.uniform(side * 0.6, length - side * 0.6) for length in size]
    axis = 0 if dx else 1
    start, end = side * 0.6 + rng.uniform(0, 8), size[axis] - side * 0.6 - rng.uniform(0, 8)
    if (dx or dy) < 0:
        start, end = end, start
    drift = rng.uniform(-6, 6)
    shade, turn_seed, frames = shaded(rng, COLOURS[colour][0], 14), rng.getrandbits(32), []
    for i in range(count):
        share = i / (count - 1)
        centre = list(middle)
        centre[axis] = start + (end - start) * share + rng.uniform(-1.5, 1.5)
        centre[1 - axis] = min(max(centre[1 - axis] + drift * share, side * 0.5), size[1 - axis] - side * 0.5)
        image = drop.image.copy()
        draw_shape(random.Random(turn_seed), image, shape, shade, (centre[0], centre[1]), side)
        frames.append(image)
    text = rng.choice(phrases.MOTION["direction"]).format(shape=shape, colour=colour)
    question = Question(spoken(rng, text, "en"), direction, f"The {shape} moves {direction}.")
    return Clip(_worn(rng, frames)), question


def film_colours(rng: random.Random) -> tuple[Clip, Question]:
    """One shape, or the whole picture, changes its colour."""
    size = (rng.randint(80, 128), rng.randint(80, 128))
    drop = backdrop(rng, size)
    count, is_whole = rng.randint(4, 8), rng.random() < 0.4
    seen = [c for c in COLOURS if is_whole or drop.is_seen(c)]
    colours = rng.sample(seen, rng.randint(2, min(3, len(seen))))
    cuts = (
        [0, *sorted(rng.sample(range(2, count - 1), len(colours) - 1)), count] if len(colours) == 2 else _thirds(count)
    )
    shape, side = rng.choice(list(SHAPES)), rng.uniform(30, 60)
    centre = (size[0] / 2 + rng.uniform(-10, 10), size[1] / 2 + rng.uniform(-10, 10))
    turn_seed, frames = rng.getrandbits(32), []
    for colour, start, end in zip(colours, cuts, cuts[1:], strict=False):
        shade = shaded(rng, COLOURS[colour][0], 14)
        image = Image.new("RGB", size, shade) if is_whole else drop.image.copy()
        if not is_whole:
            draw_shape(random.Random(turn_seed), image, shape, shade, centre, side)
        frames += [image] * (end - start)
    which = rng.choice(("first", "last"))
    text = spoken(rng, rng.choice(phrases.MOTION[which]), "en")
    answer = colours[0] if which == "first" else colours[-1]
    return Clip(_worn(rng, frames)), Question(text, answer, "The colours are " + ", ".join(colours) + ".")


def _thirds(count: int) -> list[int]:
    """Where three colours begin and end; the first and the last hold for at least one pair of frames or one frame."""
    return [0, max(1, count // 3), max(2, 2 * count // 3), count]


def _worn(rng: random.Random, frames: list[Image.Image]) -> tuple[Image.Image, ...]:
    if rng.random() < 0.3:
        strength = rng.uniform(2, 8)
        frames = [grainy(rng, frame, strength) for frame in frames]
    return tuple(frames)
