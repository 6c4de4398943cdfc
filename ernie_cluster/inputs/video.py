"""Video bytes of a stranger to patches of the ViT.

Two steps: `open_clip` reads sizes and times, or refuses the video before a pixel is decoded; `prepare_clip` samples
frames and takes them one at a time through decoding, timestamp, resizing and cutting, so that no more than one frame
is held at its original size. What a file is, its first bytes decide. Knows no prompt and no network.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ernie_cluster.errors import ContextTooLong, InvalidRequest
from ernie_cluster.inputs.animation import canvas_size, frame_durations, is_animation
from ernie_cluster.inputs.clip import ACCEPTED, Clip, VideoLimits, check_at_most, decoding, make_clip, too_large
from ernie_cluster.inputs.container import is_container, open_container
from ernie_cluster.inputs.frames import VideoConfig, check_fps, draw_time, sample_frames
from ernie_cluster.inputs.images import PixelConfig, PreparedMedia, prepared, to_patches, to_rgb
from ernie_cluster.inputs.positions import merged_grid

FRAME_LISTS = ("video/jpeg", "video/png")
"""Media types of lists of encoded frames, which have no times of their own."""
DEFAULT_SOURCE_FPS = 2.0
"""Rate at which the frames of a list were taken, when the client does not say."""


def open_clip(mime: str | None, pieces: Sequence[bytes], limits: VideoLimits, source_fps: float | None = None) -> Clip:
    """Read a video's headers.

    Args:
        mime: media type in lower case, which tells a list of frames from a file; None is a file.
        pieces: one file, or the encoded frames of a list.
        limits: see there.
        source_fps: rate at which the frames of a list were taken, 2 when None; files have times of their own.

    Raises:
        InvalidRequest: too large, too long, broken, or of a kind that is not served; `param` is None or "source_fps".
    """
    num_bytes = sum(map(len, pieces))
    if num_bytes > limits.max_bytes:
        raise too_large(f"has {num_bytes} bytes, the limit is {limits.max_bytes}; send a smaller file")
    if mime in FRAME_LISTS:
        fps = DEFAULT_SOURCE_FPS if source_fps is None else source_fps
        check_fps(fps, "source_fps")
        return _open_list(pieces, limits, fps)
    if source_fps is not None:
        raise InvalidRequest(
            "source_fps is for lists of frames; a file has times of its own, leave it out", "source_fps"
        )
    if len(pieces) != 1:
        raise InvalidRequest(f"the video comes in {len(pieces)} pieces; send one file", code="invalid_video")
    if is_container(pieces[0]):
        return open_container(pieces[0], limits)
    if is_animation(pieces[0]):
        return _open_animation(pieces[0], limits)
    raise InvalidRequest(f"the video is of no kind that is served; send {ACCEPTED}", code="invalid_video")


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
            check_at_most(len(ends_s), limits)
    except ValueError as e:
        raise InvalidRequest(f"the video cannot be read ({e}); send {ACCEPTED}", code="invalid_video") from None
    clip = make_clip([0.0, *ends_s], size, limits, functools.partial(_decode_animation, data))
    return _within(clip, limits)


def _decode_animation(data: bytes, indices: Sequence[int]) -> Iterator[Image.Image]:
    with decoding("the video"), Image.open(io.BytesIO(data), formats=("GIF", "WEBP", "PNG")) as image:
        first = int(getattr(image, "default_image", False))  # a PNG's, which is no part of the animation
        for index in indices:
            image.seek(first + index)
            yield to_rgb(image)


def _open_list(pieces: Sequence[bytes], limits: VideoLimits, fps: float) -> Clip:
    check_at_most(len(pieces), limits)
    sizes = []
    for i, piece in enumerate(pieces):
        with decoding(f"frame {i}"), _open_frame(piece) as image:
            sizes.append(image.size)
    for i, (width, height) in enumerate(sizes):
        if sizes[i] != sizes[0]:
            raise InvalidRequest(
                f"frame {i} has {width} x {height} pixels, frame 0 has {sizes[0][0]} x {sizes[0][1]}; "
                "send frames of one size",
                code="invalid_video",
            )
    ends_s = [i / fps for i in range(len(pieces) + 1)]
    size = sizes[0] if sizes else (1, 1)
    clip = make_clip(ends_s, size, limits, functools.partial(_decode_list, pieces))
    return _within(clip, limits)


def _decode_list(pieces: Sequence[bytes], indices: Sequence[int]) -> Iterator[Image.Image]:
    for index in indices:
        with decoding(f"frame {index}"), _open_frame(pieces[index]) as image:
            yield to_rgb(image)


def _open_frame(piece: bytes) -> Image.Image:
    return Image.open(io.BytesIO(piece), formats=("JPEG", "PNG"))


def _within(clip: Clip, limits: VideoLimits) -> Clip:
    """The clip, if decoding every frame of it is not too much."""
    num_frames, (width, height) = len(clip.times_s), clip.size
    if num_frames * width * height > limits.max_total_pixels:
        raise too_large(
            f"has {num_frames} frames of {width} x {height} pixels, the limit is {limits.max_total_pixels} pixels "
            "in all; send fewer or smaller ones"
        )
    return clip
