"""A video whose headers were read and found within the limits, and what reading one may raise.

Animations, lists of frames and containers each make a `Clip` in their own way; sampling needs nothing else of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from PIL import Image

from ernie_cluster.errors import InvalidRequest

Decode = Callable[[Sequence[int]], Iterator[Image.Image]]
"""RGB frames of ascending indices, one at a time; raises InvalidRequest for frames that are broken."""

ACCEPTED = "MP4, WebM, an animated GIF, WebP or PNG, or data:video/jpeg;base64,FRAME,FRAME,... with JPEG or PNG frames"


@dataclass(frozen=True, slots=True)
class VideoLimits:
    """What is accepted from a client; checked before a pixel is decoded, where not said otherwise."""

    max_bytes: int = 20 * 2**20
    """Of the encoded file, or of all encoded frames together."""
    max_frames: int = 5000
    """Frames in the file or list, sampled or not."""
    max_frame_pixels: int = 3840 * 2160
    """Width x height of a frame by its header; decoders are held to it, too."""
    max_total_pixels: int = 500_000_000
    """Pixels of all frames, sampled or not: an animation's frames build upon each other, so nearly all are decoded.
    Pillow did 70 (GIF of noise) to 400 million (PNG) per second and core of a Xeon."""
    max_coded_pixels: int = 5_000_000_000
    """Pixels that a container's decoder may have to do: those of the sampled frames, and of all frames between each
    and the key frame before it. Counted before and while decoding."""
    max_duration_s: float = 24 * 3600.0
    """From the first frame's beginning to the last one's end."""


@dataclass(frozen=True, slots=True)
class Clip:
    """A video within the limits of its headers, not yet decoded."""

    times_s: Sequence[float]
    """When each frame begins, ascending from 0."""
    duration_s: float
    size: tuple[int, int]
    """Width and height of every frame, as it is stored: a container may have it turned when it is shown."""
    decode: Decode


def make_clip(bounds_s: Sequence[float], size: tuple[int, int], limits: VideoLimits, decode: Decode) -> Clip:
    """A clip whose frame i lasts from `bounds_s[i]` to `bounds_s[i + 1]`, if it is within the limits.

    Raises:
        InvalidRequest: too short, too long, or too large.
    """
    num_frames, duration_s, (width, height) = len(bounds_s) - 1, bounds_s[-1], size
    if num_frames < 2:
        raise InvalidRequest(
            f"the video has {num_frames} frames, at least 2 are needed; send a single picture as image_url",
            code="invalid_video",
        )
    if duration_s > limits.max_duration_s:
        raise too_large(f"lasts {duration_s:.0f} seconds, the limit is {limits.max_duration_s:.0f}; send a shorter one")
    if not 0 < width * height <= limits.max_frame_pixels:
        raise too_large(
            f"has frames of {width} x {height} pixels, the limit is {limits.max_frame_pixels} each; send smaller ones"
        )
    return Clip(bounds_s[:-1], duration_s, size, decode)


def check_at_most(num_frames: int, limits: VideoLimits) -> None:
    """Raise InvalidRequest for too many frames."""
    if num_frames > limits.max_frames:
        raise too_large(f"has more than {limits.max_frames} frames; send fewer")


def too_large(what: str) -> InvalidRequest:
    """The error for a video that `what`."""
    return InvalidRequest(f"the video {what}", code="video_too_large")


@contextlib.contextmanager
def decoding(what: str) -> Iterator[None]:
    """Decoders raise nearly anything on broken files, and their words may name addresses and paths."""
    try:
        yield
    except (InvalidRequest, MemoryError):
        raise
    except Exception:
        raise InvalidRequest(f"{what} cannot be decoded; send {ACCEPTED}", code="invalid_video") from None
