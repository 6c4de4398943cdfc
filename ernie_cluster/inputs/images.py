"""Picture bytes of a stranger to patches of the ViT.

Two steps: `open_image` makes 8-bit RGB of whatever was sent, or refuses it before memory is spent; `to_patches`
resizes and cuts by the rules the models were trained with (`smart_resize` and bicubic by Pillow, as in the original
processor). Patches stay uint8: the vision replica normalises them, which sends a quarter of the bytes. Knows no
prompt and no network.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ernie_cluster.builtin.pictures import Region, pixel_box
from ernie_cluster.errors import CheckpointError, InvalidRequest
from ernie_cluster.request import MediaKind, hash_media

MAX_ASPECT_RATIO = 200


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What is accepted from a client; checked before a pixel is decoded."""

    max_bytes: int = 20 * 2**20
    """Of the encoded file."""
    max_pixels: int = 50_000_000
    """Width x height by the file's header; decoding takes up to 4 bytes for each."""
    max_side: int = 20_000
    """Pixels."""
    formats: tuple[str, ...] = ("PNG", "JPEG", "WEBP", "GIF")
    """Pillow's names of the decoders that may see a file; of an animation the first frame is taken."""


@dataclass(frozen=True, slots=True)
class PixelConfig:
    """How the model wants its pixels. Defaults are those of the original processor."""

    min_pixels: int = 4 * 28 * 28
    """Of a resized image."""
    max_pixels: int = 6177 * 28 * 28
    video_min_pixels: int = 299 * 28 * 28
    """Of a resized video frame."""
    video_max_pixels: int = 1196 * 28 * 28
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Subtracted from a channel's value / 255."""
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Divides what is left."""
    patch_size: int = 14
    merge_size: int = 2
    """Patches per token along each side."""
    temporal_merge_size: int = 2
    """Frames per token of a video."""

    @property
    def factor(self) -> int:
        """Sides of a resized picture are multiples of this, so that its patches merge evenly."""
        return self.patch_size * self.merge_size

    def resized(self, kind: MediaKind, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height to which a picture, or a frame of a video, of this width and height is resized."""
        bounds = (
            (self.min_pixels, self.max_pixels) if kind == "image" else (self.video_min_pixels, self.video_max_pixels)
        )
        height, width = smart_resize(size[1], size[0], self.factor, *bounds)
        return width, height

    def at_most(self, max_pixels: int | None) -> PixelConfig:
        """The same for an image that is shrunk to `max_pixels`, where that is less; None changes nothing."""
        if max_pixels is None or max_pixels >= self.max_pixels:
            return self
        return replace(self, min_pixels=min(self.min_pixels, max_pixels), max_pixels=max_pixels)

    @classmethod
    def from_folder(cls, folder: str | Path) -> PixelConfig:
        """Read the checkpoint's preprocessor files, whichever exist; absent keys keep the defaults.

        Three forms are understood: one file with `min_pixels` and `video_min_pixels` side by side, one file per kind
        with `size.shortest_edge`, and `processor_config.json` with an object per kind, which wins over the others.

        Raises:
            CheckpointError: a file is not JSON, or a value is of the wrong kind.
        """
        values: dict[str, Any] = {}
        for path, raw in preprocessor_files(folder):
            try:
                values |= _video_values(raw) if path.name.startswith("video") else _pixel_values(raw)
            except (ValueError, TypeError, AttributeError) as e:
                raise CheckpointError(f"{path}: not a usable preprocessor configuration: {e}") from None
        return cls(**values)


@dataclass(frozen=True, slots=True, eq=False)
class PreparedMedia:
    """A picture or video that waits for its place in a prompt."""

    kind: MediaKind
    grid_thw: tuple[int, int, int]
    """Grid in patches: frames, height, width."""
    patches: NDArray[np.uint8]
    """uint8 [t*h*w, 588] in merge-block order."""
    media_hash: bytes
    num_tokens: int
    """Placeholder tokens it takes in the prompt."""


def preprocessor_files(folder: str | Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Path and content of each of the checkpoint's preprocessor files that exists; later ones win over earlier ones.

    Raises:
        CheckpointError: a file is not a JSON object.
    """
    for name in ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"):
        path = Path(folder) / name
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except ValueError as e:
            raise CheckpointError(f"{path}: not a usable preprocessor configuration: {e}") from None
        if not isinstance(raw, dict):
            raise CheckpointError(f"{path}: holds a {type(raw).__name__}, not an object")
        yield path, raw


def open_image(data: bytes, limits: ImageLimits) -> Image.Image:
    """Decode the first frame to RGB: turned upright by its EXIF orientation, transparent parts on white.

    Raises:
        InvalidRequest: too large by bytes, pixels or side; not an accepted format; broken or cut off. The decoder's
            own words are not passed on.
        MemoryError: no memory was left for its pixels.
    """
    if len(data) > limits.max_bytes:
        raise InvalidRequest(
            f"the image has {len(data)} bytes, the limit is {limits.max_bytes}; send a smaller file",
            code="image_too_large",
        )
    try:
        with Image.open(io.BytesIO(data), formats=limits.formats) as image:
            _check_size(image.size, limits)
            image.load()
            return _turn_upright(image, to_rgb(image))
    except (InvalidRequest, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InvalidRequest(
            f"the image has more than {limits.max_pixels} pixels; send a smaller one", code="image_too_large"
        ) from None
    except Exception:  # decoders raise nearly anything on broken files, and their words may name addresses and paths
        kind, names = _foreign_format(data), ", ".join(limits.formats)
        what = "the image cannot be decoded" if kind is None else f"{kind} files are not served as pictures"
        raise InvalidRequest(
            f"{what}; send a whole file of one of these formats: {names}", code="invalid_image"
        ) from None


_FOREIGN = (
    (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"\0\0\1\0", "ICO"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (0, b"%PDF", "PDF"),
    (0, b"%!PS", "PostScript"),
    (0, b"<svg", "SVG"),
    (0, b"<?xml", "SVG"),
    (4, b"ftypavif", "AVIF"),
    (4, b"ftyphei", "HEIC"),
    (4, b"ftypmif1", "HEIC"),
    (4, b"ftyp", "MP4"),
    (0, b"\x1a\x45\xdf\xa3", "WebM"),
)
"""Where a format's mark stands, the mark, and what people call it; for the error's words only."""


def _foreign_format(data: bytes) -> str | None:
    return next((name for at, mark, name in _FOREIGN if data[at : at + len(mark)] == mark), None)


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width to resize to: multiples of `factor`, area within the bounds, aspect ratio nearly kept.

    A ratio above 200 is first cut to 200 by shortening the long side; halves are rounded to even.
    100 x 150 with factor 28 gives 112 x 140.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        short = _round_to(min(height, width), factor)
        long = short * MAX_ASPECT_RATIO // factor * factor
        height, width = (long, short) if height > width else (short, long)
    new_height, new_width = _round_to(height, factor), _round_to(width, factor)
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        longest = max(max_pixels // factor**2, 1) * factor  # beside a short side that cannot shrink below one factor
        new_height = min(max(math.floor(height / shrink / factor), 1) * factor, longest)
        new_width = min(max(math.floor(width / shrink / factor), 1) * factor, longest)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def to_patches(
    frames: Sequence[Image.Image], config: PixelConfig, kind: MediaKind = "image"
) -> tuple[NDArray[np.uint8], tuple[int, int, int]]:
    """Resize RGB frames of one size and cut them into patches.

    Returns:
        uint8 [t*h*w, 3*14*14], each row (channel, y, x) of one patch, rows in merge-block order
        (t, h/2, w/2, 2, 2), so that four consecutive rows make one token; and the grid (t, h, w) in patches.
    """
    p, m = config.patch_size, config.merge_size
    width, height = size = config.resized(kind, frames[0].size)
    pixels = np.stack([np.asarray(frame.resize(size, Image.Resampling.BICUBIC)) for frame in frames])
    t, h, w = len(frames), height // p, width // p
    blocks = pixels.reshape(t, h // m, m, p, w // m, m, p, 3).transpose(0, 1, 4, 2, 5, 7, 3, 6)
    return np.ascontiguousarray(blocks).reshape(t * h * w, 3 * p * p), (t, h, w)


def to_image(patches: NDArray[np.uint8], grid_thw: tuple[int, int, int], config: PixelConfig) -> Image.Image:
    """The resized picture, or first frame, of which `to_patches` made these patches."""
    p, m = config.patch_size, config.merge_size
    _, h, w = grid_thw
    blocks = patches[: h * w].reshape(h // m, w // m, m, m, 3, p, p).transpose(0, 2, 5, 1, 3, 6, 4)
    return Image.fromarray(np.ascontiguousarray(blocks).reshape(h * p, w * p, 3))


def prepare_image(
    data: bytes, config: PixelConfig, limits: ImageLimits, regions: Sequence[Region] = ()
) -> PreparedMedia:
    """Decode, crop to the region of its region and so on, resize, cut and hash one image.

    Raises:
        InvalidRequest, MemoryError: as `open_image` does.
    """
    image = open_image(data, limits)
    for region in regions:
        image = image.crop(pixel_box(region, image.size))
    return prepared("image", *to_patches([image], config), config)


def prepared(
    kind: MediaKind, patches: NDArray[np.uint8], grid_thw: tuple[int, int, int], config: PixelConfig
) -> PreparedMedia:
    """Hash and token count of patches as `to_patches` cuts them; the frames of a video come in whole groups."""
    per_token = config.merge_size**2 * (1 if kind == "image" else config.temporal_merge_size)
    return PreparedMedia(kind, grid_thw, patches, hash_media(kind, grid_thw, patches), len(patches) // per_token)


def _round_to(side: int, factor: int) -> int:
    return max(round(side / factor), 1) * factor


def _check_size(size: tuple[int, int], limits: ImageLimits) -> None:
    width, height = size
    if width * height > limits.max_pixels or max(size) > limits.max_side:
        raise InvalidRequest(
            f"the image has {width} x {height} pixels; the limits are {limits.max_pixels} in all "
            f"and {limits.max_side} per side; send a smaller one",
            code="image_too_large",
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any mode, transparent parts on white."""
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip at 255
        grey = np.asarray(image).astype(np.int64) >> 8
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _turn_upright(source: Image.Image, rgb: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(source.getexif().get(0x0112, 1))  # the Orientation tag
    except Exception:  # unreadable EXIF data says nothing about the pixels
        return rgb
    return rgb if turn is None else rgb.transpose(turn)


def _pixel_values(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `PixelConfig` that a file for images, or for both kinds, holds."""
    image = raw.get("image_processor") or raw
    values = {**_bounds(image, ""), **_video_values(raw.get("video_processor") or {})}
    for bound in ("video_min_pixels", "video_max_pixels"):
        if image.get(bound) is not None:
            values[bound] = int(image[bound])
    for key, target in (("image_mean", "mean"), ("image_std", "std")):
        if image.get(key) is not None:
            r, g, b = image[key]
            values[target] = (float(r), float(g), float(b))
    for key, target in _COUNTS:
        if image.get(key) is not None:
            values[target] = int(image[key])
    return values


_COUNTS = (
    ("patch_size", "patch_size"),
    ("merge_size", "merge_size"),
    ("spatial_conv_size", "merge_size"),
    ("temporal_conv_size", "temporal_merge_size"),
)


def _video_values(raw: Mapping[str, Any]) -> dict[str, Any]:
    return _bounds(raw, "video_")


def _bounds(raw: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    size = raw.get("size") or {}
    found = {
        "min_pixels": raw.get("min_pixels") or size.get("min_pixels") or size.get("shortest_edge"),
        "max_pixels": raw.get("max_pixels") or size.get("max_pixels") or size.get("longest_edge"),
    }
    return {prefix + bound: int(value) for bound, value in found.items() if value}
