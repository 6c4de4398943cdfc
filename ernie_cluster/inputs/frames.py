"""Which frames of a video the model sees, and the time that is drawn on them: the rules of the original processor.

Knows no file format and no patches.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ernie_cluster.errors import CheckpointError, InvalidRequest
from ernie_cluster.inputs.images import preprocessor_files

MAX_FPS = 240.0


@dataclass(frozen=True, slots=True)
class VideoConfig:
    """How the model wants its videos. Defaults are those of the original processor."""

    fps: float = 2.0
    """Frames per second that are taken, unless that makes too few or too many."""
    min_frames: int = 16
    """Frames taken of a short video, if it has as many."""
    max_frames: int = 180
    """Frames taken of a long video."""
    draw_timestamps: bool = True
    """Draw each frame's time into its corner; models may be trained without."""
    font: Path | None = None
    """TrueType file for the time; None is the one inside Pillow."""

    @classmethod
    def from_folder(cls, folder: str | Path) -> VideoConfig:
        """Read the checkpoint's preprocessor files, whichever exist; absent keys keep the defaults.

        The models were trained with Roboto; it is used where the folder holds it (`font`, by default
        `Roboto-Regular.ttf`). It is not shipped here: elsewhere the time is drawn with Pillow's own font.

        Raises:
            CheckpointError: a file is not JSON, a value is of the wrong kind, or the font cannot be read.
        """
        config, font = cls(), "Roboto-Regular.ttf"
        for path, raw in preprocessor_files(folder):
            try:
                values = raw.get("video_processor") or raw
                config = replace(config, **_video_values(values))
                font = Path(values.get("font") or font).name
            except (ValueError, TypeError, AttributeError) as e:
                raise CheckpointError(f"{path}: not a usable preprocessor configuration: {e}") from None
        font_path = Path(folder) / font
        if not font_path.exists():
            return config
        try:
            _font(font_path, 10)
        except OSError as e:
            raise CheckpointError(f"{font_path}: not a usable font: {e}") from None
        return replace(config, font=font_path)

    def with_wishes(
        self, fps: float | None = None, min_frames: int | None = None, max_frames: int | None = None
    ) -> VideoConfig:
        """With what a client asks for instead; None asks for nothing.

        Raises:
            InvalidRequest: out of bounds; `param` is the argument's name. A client may lower `max_frames` only.
        """
        if fps is not None:
            check_fps(fps, "fps")
        if max_frames is not None and not 1 <= max_frames <= self.max_frames:
            raise InvalidRequest(f"max_frames is {max_frames}; send 1 to {self.max_frames}", "max_frames")
        most = max_frames or self.max_frames
        if min_frames is not None and not 1 <= min_frames <= most:
            raise InvalidRequest(f"min_frames is {min_frames}; send 1 to {most}, as max_frames says", "min_frames")
        least = min(min_frames or self.min_frames, most)
        return replace(self, fps=fps or self.fps, min_frames=least, max_frames=most)


def check_fps(fps: float, param: str) -> None:
    """Raise InvalidRequest unless 0 < fps <= 240."""
    if not 0 < fps <= MAX_FPS:
        raise InvalidRequest(f"{param} is {fps}; send a number above 0 and at most {MAX_FPS:g}", param)


def sample_frames(num_frames: int, duration_s: float, config: VideoConfig) -> list[int]:
    """Indices of the frames that the model sees, ascending.

    `duration_s * fps` frames, rounded down, are wanted. Where that is within the bounds and the video has as many,
    they are those at 0, 1/fps, 2/fps ... seconds; else the video is cut into as many equal intervals as the bound
    says, and the first frame of each is taken. 40 frames in 4 seconds at 2 fps are 8, below the 16 of the default:
    0, 2, 5, 7, 10 ... 37. 100 frames in 10 seconds give 0, 5, 10 ... 95.

    The original may take one frame more than `max_frames` when the duration is no multiple of 1/fps; this does not.

    Args:
        num_frames: of the video, at least 1.
        duration_s: of the video, above 0.
        config: see there.
    """
    wanted = int(duration_s * config.fps)
    n = min(max(wanted, config.min_frames), config.max_frames, num_frames)
    if n != wanted:
        return [i * num_frames // n for i in range(n)]
    num_times = min(math.ceil(duration_s * config.fps), config.max_frames)
    indices = (round(i * num_frames / (config.fps * duration_s)) for i in range(num_times))
    return [index for index in indices if index < num_frames]


def timestamp(time_s: float) -> str:
    """The words on a frame: 3661.5 seconds are `time: 01:01:01.50`."""
    minutes, seconds = divmod(time_s, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"time: {hours:02d}:{minutes:02d}:{seconds:05.2f}"


def draw_time(frame: Image.Image, time_s: float, font: Path | None) -> Image.Image:
    """A copy of an RGB frame with its time in the upper left corner, black with a white edge.

    Letters are a tenth of the shorter side high; a frame below 10 pixels has no room and stays as it is.
    """
    size = min(frame.size) // 10
    if size < 1:
        return frame
    marked = frame.copy()
    ImageDraw.Draw(marked).text(
        (0, 0), timestamp(time_s), fill="black", font=_font(font, size), stroke_width=size // 10, stroke_fill="white"
    )
    return marked


@functools.lru_cache(maxsize=16)
def _font(path: Path | None, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size) if path is None else ImageFont.truetype(path, size)


def _video_values(raw: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `VideoConfig`. Names that begin with `video_` are those of files that serve images, too."""
    found: dict[str, Any] = {}
    for name, kind in (("fps", float), ("min_frames", int), ("max_frames", int)):
        value = raw.get(name) or raw.get(f"video_{name}")
        if value is not None:
            found[name] = kind(value)
            if not found[name] > 0:
                raise ValueError(f"{name} = {value} must be above 0")
    for name in ("draw_on_frames", "render_timestamps"):
        if raw.get(name) is not None:
            found["draw_timestamps"] = bool(raw[name])
    return found
