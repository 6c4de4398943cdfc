from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ernie_cluster.errors import InvalidRequest
from ernie_cluster.inputs import container
from ernie_cluster.inputs.clip import Clip, VideoLimits
from ernie_cluster.inputs.container import is_container, open_container
from ernie_cluster.inputs.frames import VideoConfig, draw_time, sample_frames
from ernie_cluster.inputs.images import PixelConfig, to_patches
from ernie_cluster.inputs.video import open_clip, prepare_clip

LIMITS = VideoLimits()
TINY = PixelConfig(video_min_pixels=4 * 784, video_max_pixels=16 * 784)
KINDS: dict[str, dict[str, Any]] = {
    "h264": {"codec": "libx264"},
    "h264, short groups with B-frames": {"codec": "libx264", "options": {"g": "3", "bf": "2"}},
    "h264, key frames only": {"codec": "libx264", "options": {"g": "1"}},
    "h264, open groups": {"codec": "libx264", "options": {"x264-params": "open-gop=1:keyint=6:bframes=3"}},
    "h264 in fragments": {
        "codec": "libx264",
        "options": {"g": "5"},
        "muxing": {"movflags": "frag_keyframe+empty_moov"},
    },
    "hevc": {"codec": "libx265", "options": {"x265-params": "log-level=none:keyint=8"}},
    "mpeg4": {"codec": "mpeg4", "form": "mov"},
    "vp8": {"codec": "libvpx", "form": "webm", "options": {"g": "7", "auto-alt-ref": "1", "lag-in-frames": "10"}},
    "vp9": {"codec": "libvpx-vp9", "form": "webm", "options": {"g": "7", "cpu-used": "8"}},
    "vp9 as browsers record it": {
        "codec": "libvpx-vp9",
        "form": "webm",
        "options": {"g": "5", "cpu-used": "8"},
        "muxing": {"live": "1"},
    },
}


@functools.cache
def _encoded(colours: tuple[int, ...], times: tuple[int, ...], size: tuple[int, int], key: str, turn: int) -> bytes:
    kind, out = KINDS[key], io.BytesIO()
    with av.open(out, "w", format=kind.get("form", "mp4"), options=kind.get("muxing", {})) as file:
        stream = file.add_stream(kind["codec"], rate=10, options=kind.get("options", {}))
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, 100)
        stream.codec_context.time_base = Fraction(1, 100)
        if turn:
            stream.set_display_rotation(turn)
        for colour, time in zip(colours, times, strict=True):
            pixels = np.full((size[1], size[0], 3), colour, np.uint8)
            pixels[: size[1] // 2, : size[0] // 2] = (255, 0, 0)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 100)
            for packet in stream.encode(frame):
                file.mux(packet)
        for packet in stream.encode(None):
            file.mux(packet)
    return out.getvalue()


def encoded(
    num_frames: int = 24,
    key: str = "h264",
    *,
    size: tuple[int, int] = (84, 56),
    times: Sequence[int] | None = None,
    turn: int = 0,
) -> bytes:
    """A film whose frame i has grey 10 * i, but for a red quarter in the upper left; times in hundredths."""
    colours = tuple(10 * i for i in range(num_frames))
    return _encoded(colours, tuple(times or range(0, 10 * num_frames, 10)), size, key, turn)


def grey(frame: Image.Image) -> float:
    return float(np.asarray(frame)[-8:, -8:].mean())


def every_frame(data: bytes) -> list[Image.Image]:
    """One after the other from the first, as a player does."""
    with av.open(io.BytesIO(data)) as file:
        return [Image.fromarray(frame.to_ndarray(format="rgb24")) for frame in file.decode(video=0)]


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and one.tobytes() == other.tobytes()


@pytest.mark.parametrize("key", KINDS)
def test_times_and_pixels_are_those_that_were_filmed(key: str) -> None:
    clip = open_container(encoded(key=key), LIMITS)
    assert clip.times_s == pytest.approx([i / 10 for i in range(24)], abs=1e-3)
    assert (clip.duration_s, clip.size) == (pytest.approx(2.4, abs=0.1), (84, 56))
    frames = list(clip.decode(range(24)))
    assert [grey(frame) for frame in frames] == pytest.approx([10 * i for i in range(24)], abs=4)
    assert {frame.mode for frame in frames} == {"RGB"}


@pytest.mark.parametrize("key", KINDS)
@pytest.mark.parametrize("indices", [[0], [23], [5, 6, 7], [1, 8, 9, 22], [6, 13, 20]])
def test_a_frame_is_the_same_however_it_is_reached(key: str, indices: list[int]) -> None:
    data = encoded(key=key)
    expected = every_frame(data)
    found = list(open_container(data, LIMITS).decode(indices))
    assert [same(frame, expected[i]) for frame, i in zip(found, indices, strict=True)] == [True] * len(indices)


@given(st.sets(st.integers(0, 23), min_size=1), st.sampled_from(["h264, short groups with B-frames", "vp9"]))
@settings(max_examples=30, deadline=None)
def test_any_frames_are_those_of_decoding_all(chosen: set[int], key: str) -> None:
    data = encoded(key=key)
    expected, indices = every_frame(data), sorted(chosen)
    found = list(open_container(data, LIMITS).decode(indices))
    assert [same(frame, expected[i]) for frame, i in zip(found, indices, strict=True)] == [True] * len(indices)


@pytest.mark.parametrize("key", ["h264", "vp9"])
def test_frames_may_last_differently(key: str) -> None:
    times = [0, 10, 15, 115, 120, 400]
    clip = open_container(encoded(6, key, times=times), LIMITS)
    assert clip.times_s == pytest.approx([t / 100 for t in times], abs=1e-3)
    assert clip.duration_s > 4.0
    assert [grey(f) for f in clip.decode([2, 3, 5])] == pytest.approx([20, 30, 50], abs=4)


@pytest.mark.parametrize("turn", [90, -90, 180])
def test_turned_films_stand_upright(turn: int) -> None:
    lying = encoded(4, turn=turn)
    clip = open_container(lying, LIMITS)
    (frame,) = clip.decode([3])
    assert same(frame, every_frame(lying)[3].rotate(turn, expand=True))
    assert frame.size == ((84, 56) if turn == 180 else (56, 84))


@pytest.mark.parametrize("size", [(35, 27), (17, 64), (65, 3)])
def test_odd_sizes(size: tuple[int, int]) -> None:
    clip = open_container(encoded(4, "vp9", size=size), LIMITS)
    (frame,) = clip.decode([2])
    assert clip.size == frame.size == size


def test_patches_are_those_of_the_sampled_frames() -> None:
    data = encoded()
    media = prepare_clip(open_clip("video/mp4", [data], LIMITS), TINY, VideoConfig(), max_tokens=10**6)
    indices, frames = sample_frames(24, 2.4, VideoConfig()), every_frame(data)
    shown = [draw_time(frames[i], i / 10, None) for i in indices]
    assert np.array_equal(media.patches, to_patches(shown, TINY, "video")[0])


@pytest.mark.parametrize("mime", [None, "video/mp4", "video/webm", "application/octet-stream"])
def test_the_content_decides_what_a_file_is(mime: str | None) -> None:
    for key in ("h264", "vp9"):
        assert len(open_clip(mime, [encoded(key=key)], LIMITS).times_s) == 24


def sound_only(form: str, codec: str, *, has_cover: bool = False) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format=form) as file:
        stream = file.add_stream(codec, rate=48_000, layout="mono")
        cover = file.add_stream("mjpeg", rate=1) if has_cover else None
        if cover is not None:
            cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
            cover.disposition = av.stream.Disposition.attached_pic
            for packet in cover.encode(av.VideoFrame(32, 32, "yuvj420p")):
                file.mux(packet)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.float32), format="fltp", layout="mono")
        silence.sample_rate, silence.pts = 48_000, 0
        resampler = av.AudioResampler(stream.format, "mono", 48_000, frame_size=960)
        for frame in [*resampler.resample(silence), None]:
            for packet in stream.encode(frame):
                file.mux(packet)
    return out.getvalue()


@pytest.mark.parametrize("data", [sound_only("mp4", "aac"), sound_only("webm", "libopus"), sound_only("mp4", "aac", has_cover=True)])  # fmt: skip
def test_a_file_with_sound_only_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest, match="no video in it"):
        open_container(data, LIMITS)


def test_other_codecs_are_refused_by_name() -> None:
    data = _encoded.__wrapped__  # a fresh one: the table of kinds holds served ones only
    KINDS["ffv1"] = {"codec": "ffv1", "form": "matroska"}
    try:
        unserved = data((0, 9), (0, 10), (84, 56), "ffv1", 0)
    finally:
        del KINDS["ffv1"]
    with pytest.raises(InvalidRequest, match=r"coded as ffv1 are not served; send one of: H\.264, H\.265, VP8"):
        open_container(unserved, LIMITS)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (replace(LIMITS, max_frames=23), "more than 23 frames"),
        (replace(LIMITS, max_frame_pixels=84 * 56 - 1), "4703"),
        (replace(LIMITS, max_duration_s=2), "lasts 2 seconds, the limit is 2"),
    ],
)
@pytest.mark.parametrize("key", ["h264", "vp9"])
def test_limits_hold_before_a_frame_is_decoded(
    limits: VideoLimits, words: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(container, "_frames_at", lambda *_: pytest.fail("frames were decoded"))
    with pytest.raises(InvalidRequest, match=words) as caught:
        open_container(encoded(key=key), limits)
    assert caught.value.code == "video_too_large"


def test_the_work_of_decoding_is_bounded_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a key frame every third frame, frame 20 costs three frames; with one at the beginning it costs 21."""
    few = replace(LIMITS, max_coded_pixels=3 * 84 * 56)
    (frame,) = open_container(encoded(key="h264, short groups with B-frames"), few).decode([20])
    assert grey(frame) == pytest.approx(200, abs=4)
    monkeypatch.setattr(container, "_frames_at", lambda *_: pytest.fail("frames were decoded"))
    with pytest.raises(InvalidRequest, match="takes 21 frames of 84 x 56 pixels to decode, the limit is 14112"):
        list(open_container(encoded(), few).decode([20]))


def test_the_work_of_decoding_is_bounded_while_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container._Index, "num_decoded", lambda *_: 1)  # a file whose index lies
    clip = open_container(encoded(), replace(LIMITS, max_coded_pixels=5 * 84 * 56))
    assert len(list(clip.decode([4]))) == 1
    with pytest.raises(InvalidRequest, match="takes more than 23520 pixels"):
        list(clip.decode([5]))


def decoded(data: bytes) -> str | Clip:
    """The clip after all of its frames were decoded, or the words of the refusal."""
    try:
        clip = open_clip(None, [data], LIMITS)
        list(clip.decode(range(len(clip.times_s))))
    except InvalidRequest as e:
        return e.message
    return clip


@pytest.mark.parametrize("key", ["h264", "h264 in fragments", "vp9"])
def test_what_is_left_of_a_file_is_refused_or_a_shorter_film(key: str) -> None:
    data = encoded(key=key)
    for end in range(0, len(data), 37):
        outcome = decoded(data[:end])
        assert isinstance(outcome, Clip) or "0x" not in outcome
        if key == "h264" and isinstance(outcome, Clip):  # its index stands behind the frames: no frame is missing
            assert len(outcome.times_s) == 24


@given(st.sampled_from(["h264", "vp9"]), st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), max_size=8))
@settings(max_examples=60, deadline=None)
def test_damage_raises_nothing_else(key: str, damage: list[tuple[int, int]]) -> None:
    data = bytearray(encoded(key=key))
    for at, value in damage:
        data[at % len(data)] = value
    outcome = decoded(bytes(data))
    assert isinstance(outcome, Clip) or "0x" not in outcome


@pytest.mark.parametrize(
    "data",
    [
        b"#EXTM3U\n#EXTINF:1\nfile:///etc/passwd\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"RIFF\0\0\0\0AVI LIST",
        b"FLV\x01",
        b"",
    ],
)
def test_playlists_and_other_containers_are_none(data: bytes) -> None:
    assert not is_container(data)
    with pytest.raises(InvalidRequest, match="of no kind that is served; send MP4, WebM"):
        open_clip("video/mp4", [data], LIMITS)
