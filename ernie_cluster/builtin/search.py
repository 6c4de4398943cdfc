"""Pictures that look alike: the model names one, and gets those of the operator's folder that are most like it.

Which these are, only the server can tell: it encodes the picture and looks into the index (`api/image_search.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ernie_cluster.builtin.base import Search, function
from ernie_cluster.builtin.pictures import Gallery, read_region, shortened
from ernie_cluster.builtin.zoom import BBOX_2D

DEFAULT_TOP_K = 3

IMAGE_SEARCH = function(
    "image_search",
    "Searches a collection for the images that look most like an image of this conversation, or like a region of it.",
    {
        "bbox_2d": BBOX_2D,
        "picture": {
            "type": "integer",
            "minimum": 1,
            "description": "The number of the image, by default the one that the user speaks of.",
        },
        "top_k": {"type": "integer", "minimum": 1, "description": f"How many to find, by default {DEFAULT_TOP_K}."},
    },
    [],
)


class ImageSearch:
    """Asks for what looks like a picture or, with `bbox_2d`, like a region of it, cropped at its full resolution."""

    name = "image_search"
    definition = IMAGE_SEARCH

    def run(self, arguments: Mapping[str, Any], pictures: Gallery) -> Search:
        number = arguments.get("picture", pictures.main)
        picture = pictures.find(number)
        details: dict[str, Any] = {"picture": number}
        bbox_2d = arguments.get("bbox_2d")
        if bbox_2d is not None:
            region = read_region(bbox_2d)
            picture, details["bbox_2d"] = picture.zoomed(region), list(region)
        return Search(picture, _count(arguments.get("top_k", DEFAULT_TOP_K)), details)


def _count(top_k: object) -> int:
    if isinstance(top_k, int) and not isinstance(top_k, bool) and top_k >= 1:
        return top_k
    raise ValueError(f"top_k is {shortened(top_k)}; it must be a whole number from 1 on")
