"""The four questions of the demo: painted as the model's lessons are, composed to be looked at."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from ernie_cluster.skills import reading
from ernie_cluster.skills.glyphs import draw_text
from ernie_cluster.skills.looking import bbox_2d, fractions
from ernie_cluster.skills.paint import Colour
from ernie_cluster.skills.sample import Box, Picture, Sample, user
from ernie_cluster.skills.scene import Backdrop, Kind, draw_scene
from ernie_cluster.skills.tools import ZOOM, zoom_call
from ernie_cluster.skills.words import COLOURS

_CREAM: Colour = (250, 247, 238)
_SKY: Colour = (226, 238, 248)
_FRAME: Colour = (230, 0, 110)
_ENLARGED = 3


@dataclass(frozen=True, slots=True)
class Step:
    """One question of the walk."""

    title: str
    file_stem: str
    """Name of its picture, without ".png"."""
    sample: Sample

    @property
    def picture(self) -> Picture:
        return self.sample.pictures[0]


def steps() -> tuple[Step, ...]:
    """Always the same four."""
    return (
        Step("Look at a picture", "1-look", _look()),
        Step("Think, then answer", "2-think", _think()),
        Step("Point at things", "3-point", _point()),
        Step("Think with images: zoom in by a tool call", "4-zoom", _zoom()),
    )


def _look() -> Sample:
    kinds = [("red", "circle"), ("yellow", "star"), ("blue", "heart")]
    picture = _scene(_SKY, (216, 144), kinds, [(12, 42, 72, 102), (78, 14, 144, 80), (142, 70, 204, 132)])
    answer = "A red circle, a yellow star and a blue heart."
    return Sample("describe", "en", (user(picture, "What is in this picture?"),), answer)


def _think() -> Sample:
    total = reading.Sum(47, "+", 38)
    image = Image.new("RGB", (200, 140), _CREAM)
    draw_text(random.Random(0), image, total.text, COLOURS["blue"][0], (100, 70), 46, max_width=170, is_upright=True)
    message = user(Picture(image), "What is the result?")
    return Sample("arithmetic", "en", (message,), str(total.result), enable_thinking=True)


def _point() -> Sample:
    kinds = [("green", "triangle"), ("orange", "ring"), ("purple", "star"), ("green", "square"), ("red", "heart")]
    boxes: list[Box] = [(8, 12, 62, 66), (76, 6, 132, 62), (144, 20, 208, 84), (26, 84, 78, 136), (104, 78, 160, 134)]
    picture = _scene(_CREAM, (216, 144), kinds, boxes)
    target = fractions(picture.things[2].box, picture)
    answer = json.dumps({"bbox_2d": bbox_2d(target), "label": "purple star"})
    return Sample("ground", "en", (user(picture, "Find the purple star."),), answer, target=target)


def _zoom() -> Sample:
    boxes: list[Box] = [(46, 56, 200, 210), (384, 302, 584, 502), (66, 348, 202, 484)]
    scene = _scene(_SKY, (640, 564), [("orange", "diamond"), ("green", "circle"), ("red", "square")], boxes)
    sign: Box = (374, 124, 494, 172)
    centre = ((sign[0] + sign[2]) / 2, (sign[1] + sign[3]) / 2)
    draw_text(random.Random(1), scene.image, "4271", COLOURS["black"][0], centre, 29, max_width=100, is_upright=True)
    message, target = user(scene, "What number is on the sign?"), fractions(sign, scene)
    return Sample("zoom", "en", (message,), "4271", (ZOOM,), zoom_call(target), enable_thinking=True, target=target)


def _scene(paper: Colour, size: tuple[int, int], kinds: list[Kind], boxes: list[Box]) -> Picture:
    return draw_scene(random.Random(0), Backdrop(Image.new("RGB", size, paper), paper), kinds, boxes, is_worn=False)


def framed(picture: Picture, box: Box) -> Image.Image:
    """The picture, enlarged, with a frame.

    Args:
        box: fractions of the sides.
    """
    width, height = (side * _ENLARGED for side in picture.image.size)
    image = picture.image.resize((width, height), Image.Resampling.LANCZOS)
    x0, y0, x1, y1 = (min(1.0, max(0.0, v)) for v in box)
    (left, right), (top, bottom) = sorted((x0, x1)), sorted((y0, y1))
    corners = (left * (width - 1), top * (height - 1), right * (width - 1), bottom * (height - 1))
    ImageDraw.Draw(image).rectangle(corners, outline=_FRAME, width=_ENLARGED)
    return image
