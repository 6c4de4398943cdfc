"""What the model may ask of the search for pictures."""

from __future__ import annotations

from typing import Any

import pytest

from ernie_cluster.builtin.base import Search
from ernie_cluster.builtin.pictures import Gallery, Shown, gallery_of
from ernie_cluster.builtin.search import DEFAULT_TOP_K, ImageSearch

GALLERY = Gallery((Shown("a"), Shown("b")), main=2)


@pytest.mark.parametrize(
    ("arguments", "search"),
    [
        ({}, Search(Shown("b"), DEFAULT_TOP_K, {"picture": 2})),
        ({"picture": 1, "top_k": 7, "bbox_2d": None}, Search(Shown("a"), 7, {"picture": 1})),
        (
            {"bbox_2d": [1, 2, 3, 4], "label": "cat"},
            Search(Shown("b", ((1, 2, 3, 4),)), DEFAULT_TOP_K, {"picture": 2, "bbox_2d": [1, 2, 3, 4]}),
        ),
    ],
)
def test_a_picture_or_a_region_of_it_is_looked_for(arguments: dict[str, Any], search: Search) -> None:
    assert ImageSearch().run(arguments, GALLERY) == search


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"picture": 3}, "there is no picture 3"),
        ({"bbox_2d": "here"}, "four numbers"),
        *(({"top_k": top_k}, "top_k is") for top_k in (0, -1, 2.5, "3", True, None, [1])),
    ],
)
def test_what_cannot_be_looked_for_is_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ImageSearch().run(arguments, GALLERY)


def test_a_found_picture_stays_small_and_can_be_zoomed_into() -> None:
    found = Shown("image-search:a.png", max_pixels=1000)
    gallery = gallery_of([{"role": "tool", "content": [found.part, found.zoomed((0, 0, 9, 9)).part]}])
    assert gallery.pictures == (found, Shown("image-search:a.png", ((0, 0, 9, 9),), 1000))
