from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFont

from ernie_cluster.errors import CheckpointError, InvalidRequest
from ernie_cluster.inputs.frames import VideoConfig, draw_time, sample_frames, timestamp

eighths = st.integers(1, 8 * 200).map(lambda n: n / 8)
"""Seconds that floats and fractions agree on."""
configs = st.builds(
    lambda fps, least, more: VideoConfig(fps=fps, min_frames=least, max_frames=least + more),
    st.sampled_from([0.25, 0.5, 1.0, 2.0, 4.0, 30.0]),
    st.integers(1, 40),
    st.integers(0, 200),
)


def by_the_rule(num_frames: int, duration_s: float, config: VideoConfig) -> list[int]:
    """The rule once more, in exact fractions and as it is told."""
    duration, fps = Fraction(duration_s), Fraction(config.fps)
    wanted = math.floor(duration * fps)
    if config.min_frames <= wanted <= min(config.max_frames, num_frames):
        taken, time = [], Fraction(0)
        while time < duration and len(taken) < config.max_frames:
            taken.append(round(time * num_frames / duration))
            time += 1 / fps
        return [index for index in taken if index < num_frames]
    n = min(config.max_frames if wanted > config.max_frames else max(wanted, config.min_frames), num_frames)
    return [math.floor(Fraction(num_frames, n) * i) for i in range(n)]


@given(st.integers(1, 2000), eighths, configs)
def test_frames_follow_the_rule(num_frames: int, duration_s: float, config: VideoConfig) -> None:
    assert sample_frames(num_frames, duration_s, config) == by_the_rule(num_frames, duration_s, config)


@given(st.integers(1, 5000), st.floats(1e-3, 1e5), configs)
def test_frames_are_in_order_and_within_bounds(num_frames: int, duration_s: float, config: VideoConfig) -> None:
    indices = sample_frames(num_frames, duration_s, config)
    assert indices == sorted(indices)
    assert indices[0] == 0
    assert indices[-1] < num_frames
    assert min(config.min_frames, num_frames) <= len(indices) <= config.max_frames


@pytest.mark.parametrize(
    ("num_frames", "duration_s", "expected"),
    [
        (2, 1.0, [0, 1]),  # never more than there are
        (16, 0.5, list(range(16))),
        (40, 4.0, [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27, 30, 32, 35, 37]),  # too few by fps: 16 intervals
        (100, 10.0, list(range(0, 100, 5))),  # by fps
        (240, 10.0, list(range(0, 240, 12))),
        (3600, 120.0, list(range(0, 3600, 20))),  # too many by fps: 180 intervals
    ],
)
def test_frames_of_the_original_processor(num_frames: int, duration_s: float, expected: list[int]) -> None:
    assert sample_frames(num_frames, duration_s, VideoConfig()) == expected


@pytest.mark.parametrize(
    ("time_s", "words"),
    [(0, "time: 00:00:00.00"), (9.5, "time: 00:00:09.50"), (61.25, "time: 00:01:01.25"), (86399, "time: 23:59:59.00")],
)
def test_timestamp(time_s: float, words: str) -> None:
    assert timestamp(time_s) == words


def test_the_time_stands_in_the_upper_left_corner() -> None:
    frame = Image.new("RGB", (300, 200), (90, 120, 30))
    marked = np.asarray(draw_time(frame, 7.5, None)).astype(int)
    changed = (marked != (90, 120, 30)).any(-1)
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    assert rows.max() < 30, "letters of 20 pixels and their edge"
    assert columns.min() < 10
    assert (marked == 0).all(-1).any(), "black letters"
    assert (marked == 255).all(-1).any(), "white edge"
    assert np.asarray(frame).std((0, 1)).max() == 0, "the frame itself stays as it was"


def test_different_times_look_different() -> None:
    frame = Image.new("RGB", (100, 100))
    assert draw_time(frame, 1.0, None).tobytes() != draw_time(frame, 2.0, None).tobytes()
    assert draw_time(frame, 1.0, None).tobytes() == draw_time(frame, 1.0, None).tobytes()


def test_no_room_for_letters() -> None:
    frame = Image.new("RGB", (300, 9))
    assert draw_time(frame, 1.0, None).tobytes() == frame.tobytes()


def test_wishes() -> None:
    config = VideoConfig()
    assert config.with_wishes() == config
    assert config.with_wishes(fps=1) == VideoConfig(fps=1)
    assert config.with_wishes(max_frames=8) == VideoConfig(min_frames=8, max_frames=8)
    assert config.with_wishes(min_frames=40, max_frames=60) == VideoConfig(min_frames=40, max_frames=60)


@pytest.mark.parametrize(
    ("wishes", "param"),
    [
        ({"fps": 0.0}, "fps"),
        ({"fps": -1.0}, "fps"),
        ({"fps": math.nan}, "fps"),
        ({"fps": math.inf}, "fps"),
        ({"fps": 1e9}, "fps"),
        ({"max_frames": 0}, "max_frames"),
        ({"max_frames": 181}, "max_frames"),
        ({"min_frames": 0}, "min_frames"),
        ({"min_frames": 181}, "min_frames"),
        ({"min_frames": 9, "max_frames": 8}, "min_frames"),
    ],
)
def test_wishes_out_of_bounds(wishes: dict[str, float], param: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{param} is ") as caught:
        VideoConfig().with_wishes(**wishes)  # type: ignore[arg-type]
    assert caught.value.param == param


def test_config_in_every_form(tmp_path: Path) -> None:
    def write(name: str, **values: object) -> None:
        (tmp_path / name).write_text(json.dumps(values))

    assert VideoConfig.from_folder(tmp_path) == VideoConfig()
    write("preprocessor_config.json", video_fps=1, video_max_frames=30, render_timestamps=False, min_pixels=5)
    assert VideoConfig.from_folder(tmp_path) == VideoConfig(fps=1, max_frames=30, draw_timestamps=False)
    write("video_preprocessor_config.json", fps=None, min_frames=4, draw_on_frames=True)
    assert VideoConfig.from_folder(tmp_path) == VideoConfig(fps=1, min_frames=4, max_frames=30)
    write("processor_config.json", image_processor={}, video_processor={"max_frames": 8})
    assert VideoConfig.from_folder(tmp_path).max_frames == 8


@pytest.mark.parametrize("content", ["{", "[]", '{"fps": "many"}', '{"max_frames": -1}', '{"video_processor": 3}'])
def test_unusable_config(tmp_path: Path, content: str) -> None:
    (tmp_path / "video_preprocessor_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"video_preprocessor_config\.json"):
        VideoConfig.from_folder(tmp_path)


def test_the_checkpoints_own_font(tmp_path: Path) -> None:
    font = ImageFont.load_default(10)
    assert isinstance(font, ImageFont.FreeTypeFont)
    (tmp_path / "Roboto-Regular.ttf").write_bytes(font.font_bytes)
    assert VideoConfig.from_folder(tmp_path).font == tmp_path / "Roboto-Regular.ttf"
    (tmp_path / "preprocessor_config.json").write_text('{"font": "/elsewhere/Other.ttf"}')
    assert VideoConfig.from_folder(tmp_path).font is None
    (tmp_path / "Other.ttf").write_bytes(font.font_bytes)
    path = VideoConfig.from_folder(tmp_path).font
    assert path == tmp_path / "Other.ttf"
    frame = Image.new("RGB", (100, 100))
    assert draw_time(frame, 1.0, path).tobytes() != frame.tobytes()


def test_an_unusable_font(tmp_path: Path) -> None:
    (tmp_path / "Roboto-Regular.ttf").write_bytes(b"no font")
    with pytest.raises(CheckpointError, match="not a usable font"):
        VideoConfig.from_folder(tmp_path)
