"""MP4 and WebM videos: times from the packets, and the sampled frames decoded by FFmpeg, which PyAV brings.

Opening reads every packet's time and decodes none; so variable frame rates, missing durations and missing frame counts
need no rule of their own. Decoding goes forward from the key frame before each wanted frame. FFmpeg is told the format
(of its hundreds, playlists open further files), may open nothing else, and runs in one thread.
"""

from __future__ import annotations

import contextlib
import functools
import io
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image

from ernie_cluster.errors import InvalidRequest
from ernie_cluster.inputs.clip import Clip, VideoLimits, check_at_most, decoding, make_clip, too_large

CODECS = {
    "h264": "H.264",
    "hevc": "H.265",
    "vp8": "VP8",
    "vp9": "VP9",
    "libdav1d": "AV1",
    "av1": "AV1",
    "mpeg4": "MPEG-4",
}
"""FFmpeg's names of the decoders that are used, and what people call them."""

Opened = tuple[InputContainer, VideoStream]


@dataclass(frozen=True, slots=True)
class _Index:
    """What the packets of a video stream say; times are in the stream's own unit."""

    shown: Sequence[int]
    """When each frame begins, ascending. VP8 has frames that are never shown; they count here as the rest does."""
    end: int
    """When the last one ends."""
    keys: Sequence[int]
    """When each key frame begins, ascending."""
    unit_s: Fraction
    size: tuple[int, int]

    @property
    def bounds_s(self) -> list[float]:
        return [float((time - self.shown[0]) * self.unit_s) for time in (*self.shown, self.end)]

    def key_before(self, time: int) -> int:
        """The key frame from which decoding leads to the frame at `time`; the first, if none comes before."""
        return self.keys[max(bisect_right(self.keys, time) - 1, 0)]

    def num_decoded(self, times: Sequence[int]) -> int:
        """Frames between each of these and where decoding starts for it, each counted once."""
        total, reached = 0, -1
        for time in times:
            at = bisect_right(self.shown, time) - 1
            start = bisect_right(self.shown, self.key_before(time)) - 1
            total += at - max(start - 1, reached)
            reached = at
        return total


def is_container(data: bytes) -> bool:
    """Whether the file begins as MP4 (or QuickTime) or WebM (or Matroska) does."""
    return _format(data) is not None


def open_container(data: bytes, limits: VideoLimits) -> Clip:
    """Read sizes and times of a file that `is_container`.

    Raises:
        InvalidRequest: no video in it, an unserved codec, broken, or beyond the limits.
    """
    with decoding("the video"), _opened(data, limits) as opened:
        index = _read_index(*opened, limits)
        if 0 in index.size:
            raise too_large(f"has frames of no known size, or above the limit of {limits.max_frame_pixels} pixels")
    return make_clip(index.bounds_s, index.size, limits, functools.partial(_decode, data, limits, index))


def _read_index(container: InputContainer, stream: VideoStream, limits: VideoLimits) -> _Index:
    ends: dict[int, int] = {}
    keys: list[int] = []
    for packet in container.demux(stream):
        if packet.pts is None or packet.is_discard:
            continue
        ends[packet.pts] = packet.pts + (packet.duration or 0)
        check_at_most(len(ends), limits)
        if packet.is_keyframe:
            keys.append(packet.pts)
    shown = sorted(ends)
    if not shown or not keys or stream.time_base is None:
        raise InvalidRequest("the video has no frames that can be decoded; send a whole file", code="invalid_video")
    end = ends[shown[-1]]
    if end <= shown[-1]:  # it does not say how long its last frame lasts: as long as the others do
        end = shown[-1] + max(round((shown[-1] - shown[0]) / max(len(shown) - 1, 1)), 1)
    return _Index(shown, end, sorted(keys), stream.time_base, (stream.width, stream.height))


def _decode(data: bytes, limits: VideoLimits, index: _Index, indices: Sequence[int]) -> Iterator[Image.Image]:
    wanted = [index.shown[i] for i in indices]
    width, height = index.size
    num_frames = index.num_decoded(wanted)
    if num_frames * width * height > limits.max_coded_pixels:
        raise too_large(
            f"takes {num_frames} frames of {width} x {height} pixels to decode, the limit is "
            f"{limits.max_coded_pixels} pixels; send a shorter or smaller one, or one with more key frames"
        )
    with decoding("the video"), _opened(data, limits) as opened:
        for frame in _frames_at(*opened, index, wanted, limits.max_coded_pixels):
            yield _upright(frame, index.size)


def _frames_at(
    container: InputContainer, stream: VideoStream, index: _Index, wanted: Sequence[int], max_pixels: int
) -> Iterator[VideoFrame]:
    """The frames shown at these ascending times; raises InvalidRequest where the file ends before."""
    frames: Iterator[VideoFrame] = iter(())
    frame: VideoFrame | None = None
    num_pixels = 0
    for time in wanted:
        key = index.key_before(time)
        if frame is None or _time(frame) < key:
            container.seek(key, stream=stream)
            frames, frame = container.decode(stream), None
        while frame is None or _time(frame) < time:
            frame = next(frames, None)
            if frame is None:
                raise InvalidRequest("the video is cut off or broken; send a whole file", code="invalid_video")
            num_pixels += frame.width * frame.height
            if num_pixels > max_pixels:
                raise too_large(f"takes more than {max_pixels} pixels to decode; send a shorter or smaller one")
        yield frame


def _time(frame: VideoFrame) -> int:
    """When it is shown; frames that do not say are passed over."""
    return -(2**62) if frame.pts is None else frame.pts


def _upright(frame: VideoFrame, size: tuple[int, int]) -> Image.Image:
    """RGB, all of one size even where the stream changes it, and turned as the file says."""
    if frame.is_corrupt:
        raise ValueError("a frame is damaged")
    image = Image.fromarray(frame.to_ndarray(format="rgb24", width=size[0], height=size[1]))
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


@contextlib.contextmanager
def _opened(data: bytes, limits: VideoLimits) -> Iterator[Opened]:
    """The container and its video stream, ready to decode; reading the headers may decode a frame already."""
    bounds = {"max_pixels": str(limits.max_frame_pixels), "threads": "1"}
    per_stream: list[Any] = [bounds] * _MAX_STREAMS
    container = av.open(
        io.BytesIO(data),
        "r",
        format=_format(data),
        options={"protocol_whitelist": ""},
        stream_options=per_stream,
        metadata_errors="ignore",
    )
    with container:
        stream = _video_stream(container)
        stream.codec_context.options = bounds
        stream.codec_context.thread_count = 1
        yield container, stream


_MAX_STREAMS = 64
"""Streams of a file that are held to the bounds while its headers are read; files have two or three."""


def _video_stream(container: InputContainer) -> VideoStream:
    """The first that is not the cover of a song."""
    stream = next((s for s in container.streams.video if not s.disposition & Disposition.attached_pic), None)
    if stream is None:
        raise InvalidRequest("the file has no video in it; send one with a video track", code="invalid_video")
    name = stream.codec_context.name if stream.codec_context else "unknown"
    if name not in CODECS:
        names = ", ".join(dict.fromkeys(CODECS.values()))
        raise InvalidRequest(f"videos coded as {name} are not served; send one of: {names}", code="invalid_video")
    return stream


def _format(data: bytes) -> str | None:
    if data[4:8] == b"ftyp":
        return "mp4"
    return "matroska" if data.startswith(b"\x1a\x45\xdf\xa3") else None
