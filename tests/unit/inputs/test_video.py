from __future__ import annotations

import io
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ernie_cluster.errors import ContextTooLong, InvalidRequest
from ernie_cluster.inputs.animation import canvas_size, frame_durations
from ernie_cluster.inputs.clip import VideoLimits
from ernie_cluster.inputs.frames import VideoConfig, draw_time, sample_frames
from ernie_cluster.inputs.images import PixelConfig, to_patches
from ernie_cluster.inputs.video import open_clip, prepare_clip, prepare_video, video_tokens

Encoded = Callable[..., bytes]
LIMITS = VideoLimits()
TINY = PixelConfig(video_min_pixels=4 * 784, video_max_pixels=16 * 784)
PLAIN = VideoConfig(draw_timestamps=False)
MIMES = {"GIF": "image/gif", "WEBP": "image/webp", "PNG": "image/png"}
ROOM = 10**6


def scenes(num_frames: int, size: tuple[int, int] = (84, 56)) -> list[Image.Image]:
    """Frames of few colours that differ from each other, which every format keeps as they are."""
    frames = []
    for i in range(num_frames):
        frame = Image.new("RGB", size, (0, 0, 0))
        frame.paste((255, 255 * (i % 2), 0), (i % size[0], 0, i % size[0] + 8, size[1] // 2 + i % 7))
        frames.append(frame)
    return frames


def animation(frames: Sequence[Image.Image], kind: str = "GIF", durations_ms: object = 100, **options: object) -> bytes:
    out = io.BytesIO()
    more = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(
        out,
        kind,
        save_all=True,
        append_images=frames[1:],
        duration=durations_ms,
        **(more | options),  # type: ignore[arg-type]
    )
    return out.getvalue()


def stills(frames: Sequence[Image.Image], kind: str = "PNG") -> list[bytes]:
    pieces = []
    for frame in frames:
        out = io.BytesIO()
        frame.save(out, kind)
        pieces.append(out.getvalue())
    return pieces


@given(st.lists(st.integers(1, 500), min_size=2, max_size=8), st.sampled_from(sorted(MIMES)))
def test_times_are_those_that_were_saved(hundredths: list[int], kind: str) -> None:
    data = animation(scenes(len(hundredths), (16, 12)), kind, [10 * n for n in hundredths])
    assert canvas_size(data) == (16, 12)
    assert list(frame_durations(data)) == pytest.approx([n / 100 for n in hundredths])


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_frames_without_a_duration_take_a_tenth_of_a_second(kind: str) -> None:
    assert list(frame_durations(animation(scenes(3), kind, 0))) == [0.1, 0.1, 0.1]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_every_prefix_of_a_file_is_cut_off(kind: str) -> None:
    data = animation(scenes(3, (16, 12)), kind)
    for end in range(len(data)):
        with pytest.raises(ValueError, match=r"cut off|no animated"):
            list(frame_durations(data[:end]))


@given(st.binary(max_size=200), st.sampled_from(["GIF", "WEBP", "PNG"]), st.integers(0, 400))
def test_no_bytes_raise_anything_else(junk: bytes, kind: str, keep: int) -> None:
    data = animation(scenes(3, (16, 12)), kind)[:keep] + junk
    try:
        outcome = prepare_clip(open_clip(MIMES[kind], [data], LIMITS), TINY, PLAIN, max_tokens=ROOM).kind
    except InvalidRequest as e:
        outcome = e.message
    assert outcome == "video" or "0x" not in outcome


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
@pytest.mark.parametrize("config", [PLAIN, VideoConfig(), VideoConfig(max_frames=5), VideoConfig(fps=20.0)])
def test_patches_are_those_of_the_sampled_frames(kind: str, config: VideoConfig) -> None:
    frames = scenes(30)
    clip = open_clip(MIMES[kind], [animation(frames, kind, 100)], LIMITS)
    media = prepare_clip(clip, TINY, config, max_tokens=ROOM)
    indices = sample_frames(30, 3.0, config)
    shown = [draw_time(frames[i], i / 10, None) if config.draw_timestamps else frames[i] for i in indices]
    shown += shown[-1:] * (len(shown) % 2)
    patches, grid = to_patches(shown, TINY, "video")
    assert (media.kind, media.grid_thw) == ("video", grid)
    assert np.array_equal(media.patches, patches)
    assert media.num_tokens == video_tokens(len(indices), (84, 56), TINY) == len(patches) // 8


def test_a_list_of_frames_equals_the_animation() -> None:
    frames = scenes(20)
    listed = open_clip("video/jpeg", stills(frames), LIMITS, source_fps=10)
    animated = open_clip("image/gif", [animation(frames)], LIMITS)
    assert (listed.size, listed.duration_s) == (animated.size, pytest.approx(animated.duration_s))
    assert listed.times_s == pytest.approx(animated.times_s)
    one, other = (prepare_clip(clip, TINY, VideoConfig(), max_tokens=ROOM) for clip in (listed, animated))
    assert one.media_hash == other.media_hash


def test_lists_of_jpeg_frames_are_taken_at_two_per_second() -> None:
    clip = open_clip("video/jpeg", stills(scenes(4), "JPEG"), LIMITS)
    assert clip.times_s == [0.0, 0.5, 1.0, 1.5]
    assert [frame.mode for frame in clip.decode([0, 3])] == ["RGB", "RGB"]


def test_the_first_picture_of_a_png_may_be_no_part_of_its_animation() -> None:
    frames = scenes(4)
    data = animation(frames, "PNG", default_image=True)
    (first,) = open_clip("image/apng", [data], LIMITS).decode([0])
    assert first.tobytes() == frames[1].tobytes()


@pytest.mark.parametrize(("num_frames", "t"), [(1, 2), (2, 2), (5, 6)])
def test_sampled_frames_come_in_whole_pairs(num_frames: int, t: int) -> None:
    media = prepare_video(scenes(num_frames), [float(i) for i in range(num_frames)], TINY)
    assert media.grid_thw == (t, 4, 6)
    assert media.num_tokens == t // 2 * 2 * 3
    per_frame = media.patches.reshape(t, -1)
    assert (per_frame[num_frames - 1 :] == per_frame[num_frames - 1]).all()
    if num_frames > 1:
        assert (per_frame[num_frames - 2] != per_frame[num_frames - 1]).any()


def test_whatever_changes_the_patches_changes_the_hash() -> None:
    clip = open_clip("image/gif", [animation(scenes(40))], LIMITS)
    slower = open_clip("image/gif", [animation(scenes(40), durations_ms=200)], LIMITS)
    hashes = [
        prepare_clip(c, pixels, config, max_tokens=ROOM).media_hash
        for c, pixels, config in [
            (clip, TINY, VideoConfig()),
            (clip, TINY, PLAIN),
            (clip, TINY, VideoConfig(fps=5)),
            (clip, TINY, VideoConfig(max_frames=8)),
            (clip, replace(TINY, video_max_pixels=4 * 784), VideoConfig()),
            (slower, TINY, VideoConfig()),
        ]
    ]
    assert len(set(hashes)) == len(hashes)
    again = prepare_clip(clip, TINY, VideoConfig(), max_tokens=ROOM)
    assert again.media_hash == hashes[0]


def gif_that_claims(width: int, height: int, frame: tuple[int, int] = (1, 1), num_frames: int = 2) -> bytes:
    """A GIF of tiny frames whose headers may say more."""
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    one = b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x44\x01\x00"
    return head + one * num_frames + b";"


GIF_FRAME = animation(scenes(2))
REFUSED: dict[str, tuple[str, list[bytes], VideoLimits, str]] = {
    "an empty container": ("video/mp4", [b"\0\0\0\x18ftypmp42"], LIMITS, "cannot be decoded; send MP4, WebM"),
    "a picture": ("image/jpeg", stills(scenes(1), "JPEG"), LIMITS, "of no kind that is served"),
    "words": ("video/mp4", [b"hello"], LIMITS, "of no kind that is served"),
    "no frames": ("video/jpeg", [], LIMITS, "0 frames, at least 2"),
    "one frame": ("video/jpeg", stills(scenes(1)), LIMITS, "1 frames, at least 2"),
    "a still PNG": ("image/png", stills(scenes(1)), LIMITS, "0 frames, at least 2"),
    "a still GIF": ("image/gif", stills(scenes(1), "GIF"), LIMITS, "1 frames, at least 2"),
    "a still WebP": ("image/webp", stills(scenes(1), "WEBP"), LIMITS, "cannot be read"),
    "nothing": ("image/gif", [b""], LIMITS, "of no kind that is served"),
    "two files": ("image/gif", [GIF_FRAME, GIF_FRAME], LIMITS, "2 pieces"),
    "half a file": ("image/gif", [GIF_FRAME[: len(GIF_FRAME) // 2]], LIMITS, r"cannot be read \(cut off\)"),
    "a broken frame": ("video/jpeg", [*stills(scenes(2)), b"junk"], LIMITS, "frame 2 cannot be decoded"),
    "frames of two sizes": (
        "video/jpeg", stills([*scenes(2), *scenes(1, (20, 30))]), LIMITS, "frame 2 has 20 x 30 pixels, frame 0 has 84 x 56"
    ),
    "too many bytes": ("video/jpeg", stills(scenes(2)), VideoLimits(max_bytes=100), r"bytes, the limit is 100"),
    "too many frames": ("image/gif", [gif_that_claims(1, 1, num_frames=100_000)], LIMITS, "more than 5000 frames"),
    "too long a list": ("video/jpeg", [b""] * 100_000, LIMITS, "more than 5000 frames"),
    "months": ("image/png", [animation(scenes(2), "PNG", 65_535_000)], LIMITS, "lasts 131070 seconds, the limit is 86400"),
    "large frames": ("image/gif", [gif_that_claims(60_000, 60_000)], LIMITS, "60000 x 60000 pixels, the limit is 8294400 each"),
    "no pixels": ("image/gif", [gif_that_claims(0, 9, (0, 9))], LIMITS, "0 x 9 pixels"),
    "a frame beyond the canvas": ("image/gif", [gif_that_claims(9, 9, (60_000, 60_000))], LIMITS, "beyond the canvas"),
    "too many pixels in all": (
        "image/gif", [gif_that_claims(2000, 2000, num_frames=200)], LIMITS, "200 frames of 2000 x 2000 pixels"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_a_pixel_is_decoded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mime, pieces, limits, words = REFUSED[name]
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("pixels were decoded"))
    with pytest.raises(InvalidRequest, match=words) as caught:
        open_clip(mime, pieces, limits)
    assert caught.value.code in ("invalid_video", "video_too_large")
    assert caught.value.param is None


@pytest.mark.parametrize("fps", [0.0, -1.0, float("nan"), float("inf"), 1e9])
def test_impossible_rates_of_frames(fps: float) -> None:
    with pytest.raises(InvalidRequest, match="source_fps is ") as caught:
        open_clip("video/jpeg", stills(scenes(2)), LIMITS, fps)
    assert caught.value.param == "source_fps"


def test_files_have_times_of_their_own() -> None:
    with pytest.raises(InvalidRequest, match="leave it out") as caught:
        open_clip("image/gif", [GIF_FRAME], LIMITS, 2.0)
    assert caught.value.param == "source_fps"


def test_more_tokens_than_there_is_room_for_are_refused_before_a_pixel_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clip = open_clip("image/gif", [animation(scenes(4))], LIMITS)
    num_tokens = prepare_clip(clip, TINY, PLAIN, max_tokens=12).num_tokens
    assert num_tokens == 12
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("pixels were decoded"))
    with pytest.raises(ContextTooLong, match="take 12 tokens, the context holds 11; lower max_frames"):
        prepare_clip(clip, TINY, PLAIN, max_tokens=11)


def damaged(kind: str) -> bytes:
    """A file whose headers are whole and whose last frame is not."""
    if kind == "GIF":
        return gif_that_claims(90, 90, (90, 90))
    data = bytearray(animation(scenes(6), kind))
    at = data.rindex({"WEBP": b"VP8L", "PNG": b"fdAT"}[kind]) + 12
    data[at : at + 4] = b"\xff\xff\xff\xff"
    return bytes(data)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_damage_is_told_without_the_decoders_words(kind: str) -> None:
    clip = open_clip(MIMES[kind], [damaged(kind)], LIMITS)
    with pytest.raises(InvalidRequest, match=r"^the video cannot be decoded; send MP4") as caught:
        prepare_clip(clip, TINY, PLAIN, max_tokens=ROOM)
    assert caught.value.code == "invalid_video"
