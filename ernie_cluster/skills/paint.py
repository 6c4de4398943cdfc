"""Draws shapes, backgrounds and wear. Every choice comes from the generator handed in; knows no questions."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

from ernie_cluster.skills.sample import Box

Colour = tuple[int, int, int]

_FINE = 3
"""Shapes are drawn this many times larger and shrunk, so that their edges are smooth."""


def numpy_generator(rng: random.Random) -> np.random.Generator:
    """A generator for whole arrays, seeded from `rng`."""
    return np.random.default_rng(rng.getrandbits(64))


def shaded(rng: random.Random, colour: Colour, spread: int = 18) -> Colour:
    """The colour, a little off."""
    r, g, b = (min(255, max(0, c + rng.randint(-spread, spread))) for c in colour)
    return r, g, b


def distance(a: Colour, b: Colour) -> float:
    """How unlike two colours look, 0 to about 765 (weighted by the eye's sensitivity)."""
    mean_red = (a[0] + b[0]) / 2
    r, g, b_ = (x - y for x, y in zip(a, b, strict=True))
    return math.sqrt((2 + mean_red / 256) * r * r + 4 * g * g + (2 + (255 - mean_red) / 256) * b_ * b_)


def background_colour(rng: random.Random) -> Colour:
    """Pale, dark, grey or any."""
    kind = rng.random()
    if kind < 0.5:
        base = rng.randint(215, 255)
        return shaded(rng, (base, base, base), 10)
    if kind < 0.65:
        base = rng.randint(0, 50)
        return shaded(rng, (base, base, base), 10)
    if kind < 0.8:
        base = rng.randint(60, 210)
        return shaded(rng, (base, base, base), 8)
    return rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255)


def background(rng: random.Random, size: tuple[int, int], colour: Colour) -> Image.Image:
    """Plain, a gradient, blurred clouds, or stripes; all near `colour`."""
    kind = rng.random()
    if kind < 0.45:
        return Image.new("RGB", size, colour)
    width, height = size
    other = shaded(rng, colour, 32)
    if kind < 0.65:
        angle = rng.uniform(0, 2 * math.pi)
        x, y = np.linspace(0, math.cos(angle), width), np.linspace(0, math.sin(angle), height)
        share = x[None, :] + y[:, None]
        share = (share - share.min()) / (np.ptp(share) + 1e-9)
    elif kind < 0.8:
        cells = numpy_generator(rng).integers(0, 256, (rng.randint(2, 6), rng.randint(2, 6)), dtype=np.uint8)
        share = np.asarray(Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)) / 255.0
    else:
        angle, period = rng.uniform(0, math.pi), rng.uniform(6, 40)
        steps = np.arange(width)[None, :] * math.cos(angle) + np.arange(height)[:, None] * math.sin(angle)
        share = ((steps % period) < period / 2).astype(float)
        other = shaded(rng, colour, 16)
    pixels = np.array(colour) * (1 - share[..., None]) + np.array(other) * share[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def worn(rng: random.Random, image: Image.Image) -> Image.Image:
    """The picture as it arrives: at times grainy, or after JPEG or a palette of few colours."""
    if rng.random() < 0.3:
        image = grainy(rng, image, rng.uniform(2, 12))
    kind = rng.random()
    if kind < 0.12:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=rng.randint(40, 95))
        return Image.open(file).convert("RGB")
    if kind < 0.16:
        return image.quantize(rng.choice((32, 64, 128, 256)), dither=Image.Dither.NONE).convert("RGB")
    return image


def grainy(rng: random.Random, image: Image.Image, strength: float) -> Image.Image:
    """With noise of that standard deviation, in levels of 256."""
    noise = numpy_generator(rng).standard_normal((image.height, image.width, 3), dtype=np.float32) * strength
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def draw_shape(
    rng: random.Random, image: Image.Image, shape: str, colour: Colour, centre: tuple[float, float], size: float
) -> Box:
    """Draw one shape into `image`, a little turned and squeezed.

    Args:
        shape: a key of `words.SHAPES`.
        centre: in pixels.
        size: side of the square that roughly holds it, pixels.

    Returns:
        The smallest box that holds what was drawn.
    """
    turn = rng.uniform(-0.2, 0.2) if shape != "triangle" else rng.choice((0.0, math.pi)) + rng.uniform(-0.35, 0.35)
    stretch = rng.uniform(0.94, 1.06)
    side = math.ceil(size * 1.3) + 2
    mask = Image.new("L", (side * _FINE, side * _FINE))
    middle, scale = side * _FINE / 2, size * _FINE / 2
    for ring in _outlines(rng, shape):
        points = [_turned(x * stretch, y / stretch, turn) for x, y in ring]
        fill = 0 if ring is _HOLE else 255
        ImageDraw.Draw(mask).polygon([(middle + x * scale, middle + y * scale) for x, y in points], fill=fill)
    mask = mask.resize((side, side), Image.Resampling.BOX)
    left, top = round(centre[0] - side / 2), round(centre[1] - side / 2)
    image.paste(colour, (left, top), mask)
    x0, y0, x1, y1 = mask.point(_SOLID).getbbox() or (0, 0, side, side)
    return left + x0, top + y0, left + x1, top + y1


_SOLID = [0] * 64 + [255] * 192
Point = tuple[float, float]


def _turned(x: float, y: float, angle: float) -> Point:
    return x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)


def _circle(radius: float, count: int = 48) -> list[Point]:
    return [(radius * math.cos(2 * math.pi * i / count), radius * math.sin(2 * math.pi * i / count)) for i in range(count)]  # fmt: skip


def _star(rng: random.Random) -> list[Point]:
    inner = rng.uniform(0.4, 0.5)
    radii = [1.05 if i % 2 == 0 else inner for i in range(10)]
    return [(r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5)) for i, r in enumerate(radii)]


def _heart(rng: random.Random) -> list[Point]:
    del rng
    points = []
    for i in range(48):
        t = 2 * math.pi * i / 48
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((16 * math.sin(t) ** 3 / 16, -(y + 2.5) / 15))
    return points


def _cross(rng: random.Random) -> list[Point]:
    a = rng.uniform(0.28, 0.4)
    return [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]


_OUTLINES: dict[str, Callable[[random.Random], list[Point]]] = {
    "circle": lambda rng: _circle(1.0),
    "ring": lambda rng: _circle(1.0),
    "square": lambda rng: [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": lambda rng: [(0, -0.95), (1, 0.8), (-1, 0.8)],
    "star": _star,
    "heart": _heart,
    "diamond": lambda rng: [(0, -1.05), (0.7, 0), (0, 1.05), (-0.7, 0)],
    "cross": _cross,
}
_HOLE: list[Point] = _circle(0.55)


def _outlines(rng: random.Random, shape: str) -> Sequence[list[Point]]:
    outline = _OUTLINES[shape](rng)
    return (outline, _HOLE) if shape == "ring" else (outline,)
