"""Video bytes of a stranger to patches of the ViT.

Two steps: `open_clip` reads sizes and times, or refuses the video before a pixel is decoded; `prepare_clip` samples
frames and takes them one at a time through decoding, timestamp, resizing and cutting, so that no more than one frame
is held at its original size. Accepted are animated files and lists of frames; a decoder of real containers would be
one more case of `open_clip`. Knows no prompt and no network.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ernie_cluster.errors import ContextTooLong, InvalidRequest
from ernie_cluster.inputs.animation import canvas_size, frame_durations
from ernie_cluster.inputs.frames import VideoConfig, check_fps, draw_time, sample_frames
from ernie_cluster.inputs.images import PixelConfig, PreparedMedia, prepared, to_patches, to_rgb
from ernie_cluster.inputs.positions import merged_grid

ANIMATIONS = ("image/gif", "image/webp", "image/png", "image/apng")
"""Media types of files with frames and times in them."""
FRAME_LISTS = ("video/jpeg", "video/png")
"""Media types of lists of encoded frames, which have no times of their own."""
DEFAULT_SOURCE_FPS = 2.0
"""Rate at which the frames of a list were taken, when the client does not say."""

Decode = Callable[[Sequence[int]], Iterator[Image.Image]]
"""RGB frames of ascending indices, one at a time; raises InvalidRequest for frames that are broken."""

_ACCEPTED = "an animated GIF, WebP or PNG, or data:video/jpeg;base64,FRAME,FRAME,... with JPEG or PNG frames"


@dataclass(frozen=True, slots=True)
class VideoLimits:
    """What is accepted from a client; checked before a pixel is decoded."""

    max_bytes: int = 20 * 2**20
    """Of the encoded file, or of all encoded frames together."""
    max_frames: int = 5000
    """Frames in the file or list, sampled or not."""
    max_frame_pixels: int = 3840 * 2160
    """Width x height of a frame by its header."""
    max_total_pixels: int = 500_000_000
    """Pixels of all frames, sampled or not: an animation's frames build upon each other, so nearly all are decoded.
    Pillow did 70 (GIF of noise) to 400 million (PNG) per second and core of a Xeon."""
    max_duration_s: float = 24 * 3600.0
    """From the first frame's beginning to the last one's end."""


@dataclass(frozen=True, slots=True)
class Clip:
    """A video within the limits of its headers, not yet decoded."""

    times_s: Sequence[float]
    """When each frame begins, ascending from 0."""
    duration_s: float
    size: tuple[int, int]
    """Width and height of every frame."""
    decode: Decode


def open_clip(mime: str, pieces: Sequence[bytes], limits: VideoLimits, source_fps: float | None = None) -> Clip:
    """Read a video's headers.

    Args:
        mime: media type in lower case.
        pieces: one animated file, or the encoded frames of a list.
        limits: see there.
        source_fps: rate at which the frames of a list were taken, 2 when None; files have times of their own.

    Raises:
        InvalidRequest: too large, too long, broken, or of a kind that is not served; `param` is None or "source_fps".
    """
    num_bytes = sum(map(len, pieces))
    if num_bytes > limits.max_bytes:
        raise _too_large(f"has {num_bytes} bytes, the limit is {limits.max_bytes}; send a smaller file")
    if mime in FRAME_LISTS:
        fps = DEFAULT_SOURCE_FPS if source_fps is None else source_fps
        check_fps(fps, "source_fps")
        return _open_list(pieces, limits, fps)
    if mime not in ANIMATIONS:
        raise InvalidRequest(f"videos of type {mime} are not served; send {_ACCEPTED}", code="invalid_video")
    if source_fps is not None:
        raise InvalidRequest(
            "source_fps is for lists of frames; a file has times of its own, leave it out", "source_fps"
        )
    if len(pieces) != 1:
        raise InvalidRequest(f"{len(pieces)} pieces of type {mime}; send one file", code="invalid_video")
    return _open_animation(pieces[0], limits)


def prepare_clip(clip: Clip, pixels: PixelConfig, config: VideoConfig, *, max_tokens: int) -> PreparedMedia:
    """Sample, decode, mark, resize, cut and hash a video.

    Args:
        max_tokens: that its place in a prompt may take; more is refused before a pixel is decoded.

    Raises:
        ContextTooLong: more than `max_tokens`.
        InvalidRequest: a frame cannot be decoded.
    """
    indices = sample_frames(len(clip.times_s), clip.duration_s, config)
    num_tokens = video_tokens(len(indices), clip.size, pixels)
    if num_tokens > max_tokens:
        raise ContextTooLong(
            f"{len(indices)} frames of the video take {num_tokens} tokens, the context holds {max_tokens}; "
            "lower max_frames or send smaller frames",
            None,
        )
    return prepare_video(clip.decode(indices), [clip.times_s[i] for i in indices], pixels, config)


def prepare_video(
    frames: Iterable[Image.Image],
    times_s: Sequence[float],
    pixels: PixelConfig,
    config: VideoConfig | None = None,
) -> PreparedMedia:
    """Mark, resize, cut and hash frames that are sampled already.

    The last one, with its time on it, is repeated until the count divides by `temporal_merge_size`.

    Args:
        frames: RGB, all of one size; taken one at a time.
        times_s: when each of them is shown; at least one.
        pixels: see there.
        config: only what it says about timestamps counts; None is the original processor's.
    """
    config = config or VideoConfig()
    num_frames = len(times_s)
    t = num_frames + -num_frames % pixels.temporal_merge_size
    patches: NDArray[np.uint8] | None = None
    for i, (frame, time_s) in enumerate(zip(frames, times_s, strict=True)):
        marked = draw_time(frame, time_s, config.font) if config.draw_timestamps else frame
        rows, (_, h, w) = to_patches([marked], pixels, "video")
        if patches is None:
            patches = np.empty((t * h * w, rows.shape[1]), np.uint8)
        patches[i * h * w : (i + 1) * h * w] = rows
    assert patches is not None, "a video without frames"
    patches.reshape(t, h * w, -1)[num_frames:] = rows
    return prepared("video", patches, (t, h, w), pixels)


def video_tokens(num_frames: int, size: tuple[int, int], pixels: PixelConfig) -> int:
    """Placeholder tokens of so many frames of this width and height."""
    width, height = pixels.resized("video", size)
    t = num_frames + -num_frames % pixels.temporal_merge_size
    grid = (t, height // pixels.patch_size, width // pixels.patch_size)
    merged_t, merged_h, merged_w = merged_grid("video", grid, pixels.merge_size, pixels.temporal_merge_size)
    return merged_t * merged_h * merged_w


def _open_animation(data: bytes, limits: VideoLimits) -> Clip:
    ends_s: list[float] = []
    try:
        size = canvas_size(data)
        for end_s in accumulate(frame_durations(data)):
            ends_s.append(end_s)
            _check_at_most(len(ends_s), limits)
    except ValueError as e:
        raise InvalidRequest(f"the video cannot be read ({e}); send {_ACCEPTED}", code="invalid_video") from None
    return _clip([0.0, *ends_s], size, limits, functools.partial(_decode_animation, data))


def _decode_animation(data: bytes, indices: Sequence[int]) -> Iterator[Image.Image]:
    with _decoding("the video"), Image.open(io.BytesIO(data), formats=("GIF", "WEBP", "PNG")) as image:
        first = int(getattr(image, "default_image", False))  # a PNG's, which is no part of the animation
        for index in indices:
            image.seek(first + index)
            yield to_rgb(image)


def _open_list(pieces: Sequence[bytes], limits: VideoLimits, fps: float) -> Clip:
    _check_at_most(len(pieces), limits)
    sizes = []
    for i, piece in enumerate(pieces):
        with _decoding(f"frame {i}"), _open_frame(piece) as image:
            sizes.append(image.size)
    for i, (width, height) in enumerate(sizes):
        if sizes[i] != sizes[0]:
            raise InvalidRequest(
                f"frame {i} has {width} x {height} pixels, frame 0 has {sizes[0][0]} x {sizes[0][1]}; "
                "send frames of one size",
                code="invalid_video",
            )
    ends_s = [i / fps for i in range(len(pieces) + 1)]
    return _clip(ends_s, sizes[0] if sizes else (1, 1), limits, functools.partial(_decode_list, pieces))


def _decode_list(pieces: Sequence[bytes], indices: Sequence[int]) -> Iterator[Image.Image]:
    for index in indices:
        with _decoding(f"frame {index}"), _open_frame(pieces[index]) as image:
            yield to_rgb(image)


def _open_frame(piece: bytes) -> Image.Image:
    return Image.open(io.BytesIO(piece), formats=("JPEG", "PNG"))


@contextlib.contextmanager
def _decoding(what: str) -> Iterator[None]:
    """Decoders raise nearly anything on broken files, and their words may name addresses and paths."""
    try:
        yield
    except Exception:
        raise InvalidRequest(f"{what} cannot be decoded; send {_ACCEPTED}", code="invalid_video") from None


def _clip(bounds_s: Sequence[float], size: tuple[int, int], limits: VideoLimits, decode: Decode) -> Clip:
    """A clip whose frame i lasts from `bounds_s[i]` to `bounds_s[i + 1]`, if it is within the limits."""
    num_frames, duration_s, (width, height) = len(bounds_s) - 1, bounds_s[-1], size
    if num_frames < 2:
        raise InvalidRequest(
            f"the video has {num_frames} frames, at least 2 are needed; send a single picture as image_url",
            code="invalid_video",
        )
    if duration_s > limits.max_duration_s:
        raise _too_large(
            f"lasts {duration_s:.0f} seconds, the limit is {limits.max_duration_s:.0f}; send a shorter one"
        )
    if not 0 < width * height <= limits.max_frame_pixels:
        raise _too_large(
            f"has frames of {width} x {height} pixels, the limit is {limits.max_frame_pixels} each; send smaller ones"
        )
    if num_frames * width * height > limits.max_total_pixels:
        raise _too_large(
            f"has {num_frames} frames of {width} x {height} pixels, the limit is {limits.max_total_pixels} pixels "
            "in all; send fewer or smaller ones"
        )
    return Clip(bounds_s[:-1], duration_s, size, decode)


def _check_at_most(num_frames: int, limits: VideoLimits) -> None:
    if num_frames > limits.max_frames:
        raise _too_large(f"has more than {limits.max_frames} frames; send fewer")


def _too_large(what: str) -> InvalidRequest:
    return InvalidRequest(f"the video {what}", code="video_too_large")
