"""A picture of a prompt as people can look at it: from patches back to a small file."""

from __future__ import annotations

import base64
import io

from PIL import Image

from ernie_cluster.inputs.images import PixelConfig, to_image
from ernie_cluster.request import MediaInput

MAX_SIDE = 512
"""Pixels; larger pictures are shrunk."""
QUALITY = 85


def thumbnail_url(media: MediaInput, config: PixelConfig) -> str:
    """A JPEG of a picture, or of a video's first frame, as a data URL; some tens of kilobytes. CPU work."""
    assert media.patches is not None
    image = to_image(media.patches, media.grid_thw, config)
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
