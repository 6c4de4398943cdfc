"""Regions of pictures, and which picture is meant."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_cluster.builtin.base import ToolResult
from ernie_cluster.builtin.pictures import MIN_SIDE, Gallery, Shown, gallery_of, pixel_box, read_region
from ernie_cluster.builtin.zoom import Zoom

WITHIN = st.floats(0, 1000)


@given(WITHIN, WITHIN, WITHIN, WITHIN, st.integers(1, 3000), st.integers(1, 3000))
def test_a_region_is_never_empty_and_never_outside(a: float, b: float, c: float, d: float, w: int, h: int) -> None:
    if a == c or b == d:
        return
    x0, y0, x1, y1 = pixel_box(read_region([min(a, c), min(b, d), max(a, c), max(b, d)]), (w, h))
    assert 0 <= x0 <= x1 - min(MIN_SIDE, w) <= x1 <= w
    assert 0 <= y0 <= y1 - min(MIN_SIDE, h) <= y1 <= h


def test_a_region_in_pixels() -> None:
    assert pixel_box((250, 250, 500, 500), (400, 200)) == (100, 50, 200, 100)
    assert pixel_box((0, 0, 1000, 1000), (401, 203)) == (0, 0, 401, 203)
    assert read_region([-50, 2.5, 10**400, 999]) == (0, 2.5, 1000, 999)


@pytest.mark.parametrize(
    "bbox",
    [
        None, "0 0 9 9", {}, [], [1, 2, 3], [1, 2, 3, 4, 5], [0, 0, 1, "a"], [0, 0, 1, True], [0, 0, 1, None],
        [float("nan"), 0, 9, 9], [0, 0, 0, 0], [500, 500, 100, 100], [1000, 0, 1200, 9], [0, -9, 9, 0],
    ],
)  # fmt: skip
def test_what_is_no_region_is_refused(bbox: object) -> None:
    with pytest.raises(ValueError, match="bbox_2d"):
        read_region(bbox)


def picture(url: str, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def test_the_pictures_of_a_conversation_in_order() -> None:
    crop = Shown("a").zoomed((0, 0, 500, 500)).zoomed((0, 0, 10, 10))
    gallery = gallery_of(
        [
            {"role": "user", "content": [picture("a")]},
            {"role": "tool", "content": ToolResult(pictures=(crop,)).content},
            {"role": "assistant", "content": None},
            {"role": "user", "content": [{"type": "text", "text": "?"}, picture("b"), picture("c")]},
            {"role": "user", "content": "and now?"},
        ]
    )
    assert gallery == Gallery((Shown("a"), crop, Shown("b"), Shown("c")), main=3)
    assert gallery_of([]) == Gallery()


def test_zooming_points_at_a_region_of_the_picture_that_is_spoken_of() -> None:
    gallery = Gallery((Shown("a"), Shown("b", ((0, 0, 500, 500),))), main=1)
    result = Zoom().run({"bbox_2d": [1, 2, 3, 4], "label": "x"}, gallery)
    assert result.pictures == (Shown("a", ((1, 2, 3, 4),)),)
    assert result.details == {"picture": 1, "bbox_2d": [1, 2, 3, 4]}
    second = Zoom().run({"bbox_2d": [1, 2, 3, 4], "picture": 2}, gallery)
    assert second.pictures == (Shown("b", ((0, 0, 500, 500), (1, 2, 3, 4))),)


@pytest.mark.parametrize("number", [0, 3, -1, "1", 1.0, True, None, [1], 10**30])
def test_pictures_that_do_not_exist(number: object) -> None:
    with pytest.raises(ValueError, match=r"there is no picture .*; there are 1 to 2"):
        Zoom().run({"bbox_2d": [0, 0, 9, 9], "picture": number}, Gallery((Shown("a"), Shown("b"))))
    with pytest.raises(ValueError, match="no picture in this conversation"):
        Zoom().run({"bbox_2d": [0, 0, 9, 9]}, Gallery())


def test_a_result_is_text_or_parts() -> None:
    assert ToolResult("7").content == "7"
    assert [part["type"] for part in ToolResult("see", (Shown("a"),)).content if isinstance(part, dict)] == [
        "text",
        "image_url",
    ]
