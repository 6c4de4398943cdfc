"""Thinking with images: the model asks for a region of a picture, and gets it enlarged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ernie_cluster.builtin.base import ToolResult, function
from ernie_cluster.builtin.pictures import Gallery, read_region

BBOX_2D: Mapping[str, Any] = {
    "type": "array",
    "items": {"type": "number"},
    "minItems": 4,
    "maxItems": 4,
    "description": "The region [x1, y1, x2, y2], in 0-1000 of the width and height.",
}
"""Schema of a region as `read_region` reads it."""

ZOOM = function(
    "image_zoom_in_tool",
    "Zooms into a region of the image by cropping it, to see more.",
    {
        "bbox_2d": BBOX_2D,
        "label": {"type": "string", "description": "The name of the object."},
    },
    ["bbox_2d"],
)
"""Name and parameters. Source: FastDeploy docs/get_started/ernie-4.5-vl-thinking.md."""


class Zoom:
    """Crops the picture that the user speaks of, or, by `"picture": 2`, the one that the prompt calls Picture 2.

    The model is not told of the latter; a system message may do so where there are several pictures.
    """

    name = "image_zoom_in_tool"
    definition = ZOOM

    def run(self, arguments: Mapping[str, Any], pictures: Gallery) -> ToolResult:
        number = arguments.get("picture", pictures.main)
        picture = pictures.find(number)
        region = read_region(arguments.get("bbox_2d"))
        return ToolResult(pictures=(picture.zoomed(region),), details={"picture": number, "bbox_2d": list(region)})
