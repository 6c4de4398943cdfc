"""Pictures and videos that no server has seen before: cheap to paint, and never the same twice."""

from __future__ import annotations

import random

from PIL import Image, ImageDraw

from ernie_cluster.skills.sample import Clip, Picture

FPS = 2.0
_NUM_SHAPES = 6


def paint(chance: random.Random, side: int) -> str:
    """A square picture as a PNG data URL; ERNIE-4.5-VL makes about (side / 28)^2 tokens of it."""
    return Picture(_scene(chance, side)).data_url()


def film(chance: random.Random, side: int, num_frames: int) -> str:
    """A ball crosses a scene; JPEG frames in one data URL, as our API and vLLM's take them."""
    scene, frames = _scene(chance, side), []
    for i in range(num_frames):
        frame = scene.copy()
        left = (side * 3 // 4) * i // max(1, num_frames - 1)
        ImageDraw.Draw(frame).ellipse((left, side // 3, left + side // 4, side // 3 + side // 4), fill=(220, 60, 30))
        frames.append(frame)
    return Clip(tuple(frames), FPS).data_url()


def _scene(chance: random.Random, side: int) -> Image.Image:
    image = Image.new("RGB", (side, side), _colour(chance))
    draw = ImageDraw.Draw(image)
    for _ in range(_NUM_SHAPES):
        left, top, size = chance.randrange(side), chance.randrange(side), chance.randrange(4, side // 2)
        draw.ellipse((left, top, left + size, top + size), fill=_colour(chance))
    return image


def _colour(chance: random.Random) -> tuple[int, int, int]:
    return chance.randrange(256), chance.randrange(256), chance.randrange(256)
