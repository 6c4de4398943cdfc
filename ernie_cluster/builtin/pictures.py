"""The pictures of a conversation as tools see them: references, numbered as in the prompt, and regions of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

Region = tuple[float, float, float, float]
"""Left, top, right, bottom in thousandths of a picture's width and height; left < right, top < bottom."""

MIN_SIDE = 2
"""Pixels that a region has at least each way, where the picture has them."""


def read_region(bbox_2d: object) -> Region:
    """The region that a model names; what lies outside of the picture is cut off.

    Raises:
        ValueError: not four numbers, or nothing of the picture is inside.
    """
    if not isinstance(bbox_2d, (list, tuple)) or len(bbox_2d) != 4 or not all(map(_is_number, bbox_2d)):
        raise ValueError(f"bbox_2d is {shortened(bbox_2d)}; it must be four numbers [x1, y1, x2, y2] from 0 to 1000")
    left, top, right, bottom = (min(1000.0, max(0.0, value)) for value in bbox_2d)
    if left >= right or top >= bottom:
        raise ValueError(
            f"bbox_2d is {shortened(bbox_2d)}, which holds nothing of the picture; x1 < x2 and y1 < y2 must lie in 0-1000"
        )
    return left, top, right, bottom


def pixel_box(region: Region, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom in pixels of a picture of this width and height, right and bottom exclusive.

    (250, 250, 500, 500) of 400 x 200 gives (100, 50, 200, 100).
    """
    left, top, right, bottom = region
    (x0, x1), (y0, y1) = _span(left, right, size[0]), _span(top, bottom, size[1])
    return x0, y0, x1, y1


def _span(low: float, high: float, side: int) -> tuple[int, int]:
    least = min(MIN_SIDE, side)
    start = min(int(low / 1000 * side), side - least)
    return start, max(round(high / 1000 * side), start + least)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value  # NaN is not


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture that stands in the conversation."""

    url: str
    """By which the request names the file."""
    regions: tuple[Region, ...] = ()
    """What is seen of it: the region of its region, and so on."""
    max_pixels: int | None = None
    """To which what is seen is shrunk; None = to what the model takes."""

    def zoomed(self, region: Region) -> Shown:
        """This region of it."""
        return replace(self, regions=(*self.regions, region))

    @property
    def part(self) -> dict[str, Any]:
        """As a part of a message; `regions` and `max_pixels` are ours, and clients cannot send them."""
        bound = {} if self.max_pixels is None else {"max_pixels": self.max_pixels}
        return {"type": "image_url", "image_url": {"url": self.url, "regions": self.regions, **bound}}


@dataclass(frozen=True, slots=True)
class Gallery:
    """All pictures of a conversation, in order."""

    pictures: tuple[Shown, ...] = ()
    main: int = 1
    """Number of the one that is spoken of: the first of the last user's message that shows any."""

    def find(self, number: object) -> Shown:
        """The picture of this number, counted from 1 as in the prompt; raises ValueError."""
        if not self.pictures:
            raise ValueError("there is no picture in this conversation")
        if isinstance(number, int) and not isinstance(number, bool) and 1 <= number <= len(self.pictures):
            return self.pictures[number - 1]
        raise ValueError(f"there is no picture {shortened(number)}; there are 1 to {len(self.pictures)}")


def gallery_of(messages: Iterable[Mapping[str, Any]]) -> Gallery:
    """The pictures of OpenAI-shaped messages."""
    pictures: list[Shown] = []
    main = 1
    for message in messages:
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        found = [part["image_url"] for part in parts if part["type"] == "image_url"]
        if found and message["role"] == "user":
            main = len(pictures) + 1
        pictures += [Shown(g["url"], tuple(g.get("regions", ())), g.get("max_pixels")) for g in found]
    return Gallery(tuple(pictures), main)


def shortened(value: object, limit: int = 80) -> str:
    """For a message to the model; escapes whatever is no Unicode."""
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."
