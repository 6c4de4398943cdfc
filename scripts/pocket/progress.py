"""Progress of a run: a line on the terminal, and a plot of the loss drawn with Pillow."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

from PIL import Image, ImageDraw
from teach import Report

_SMOOTH = 0.97
_PLOT_EVERY_S = 30.0


class Progress:
    """Takes the report of every step.

    Args:
        steps: of the whole run.
        plot: PNG file to write.
    """

    def __init__(self, steps: int, plot: Path) -> None:
        self._steps, self._plot = steps, plot
        self._mean: dict[str, float] = {}
        self._losses: list[tuple[int, float]] = []
        self._last_plotted = self._last_line = 0.0

    def __call__(self, report: Report) -> None:
        news = {"loss": report.loss, "scaffold": report.scaffold_loss, "right": report.accuracy,
                "rate": report.num_samples / report.seconds, "step_s": report.seconds}  # fmt: skip
        for key, value in news.items():
            self._mean[key] = self._mean.get(key, value) * _SMOOTH + value * (1 - _SMOOTH)
        if report.loss > 0:  # there are no answers while the eyes are taught
            self._losses.append((report.step, report.loss))
        now = time.monotonic()
        is_last = report.step + 1 == self._steps
        if now - self._last_line > (0.5 if sys.stderr.isatty() else 20.0) or is_last:
            self._last_line = now
            print(self._line(report.step + 1), end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)
        if self._losses and (now - self._last_plotted > _PLOT_EVERY_S or is_last):
            self._last_plotted = now
            draw_plot(self._losses, self._plot)

    def close(self) -> None:
        """End the line."""
        print(file=sys.stderr)

    def _line(self, done: int) -> str:
        bar = "#" * (24 * done // self._steps)
        left_s = (self._steps - done) * self._mean["step_s"]
        return (
            f"[{bar:24}] {done}/{self._steps}  loss {self._mean['loss']:.3f}  scaffold {self._mean['scaffold']:.3f}  "
            f"tokens right {self._mean['right']:.1%}  {self._mean['rate']:.0f} samples/s  "
            f"{int(left_s) // 60:d}:{int(left_s) % 60:02d} left "
        )


def draw_plot(losses: list[tuple[int, float]], path: Path) -> None:
    """The loss over the steps, its axis logarithmic: each step faintly, their running mean in red."""
    width, height, margin = 900, 500, 50
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    low, high = math.log(max(min(v for _, v in losses), 1e-4)), math.log(max(v for _, v in losses))
    last = max(step for step, _ in losses) or 1

    def place(step: int, value: float) -> tuple[float, float]:
        share = (math.log(max(value, 1e-4)) - low) / (high - low or 1)
        return margin + step / last * (width - 2 * margin), height - margin - share * (height - 2 * margin)

    for mark in (5, 2, 1, 0.5, 0.2, 0.1, 0.05, 0.02):
        if low <= math.log(mark) <= high:
            _, y = place(0, mark)
            draw.line((margin, y, width - margin, y), "#dddddd")
            draw.text((8, y - 6), f"{mark:g}", "black")
    mean, smooth = losses[0][1], []
    for step, value in losses:
        mean = 0.97 * mean + 0.03 * value
        smooth.append(place(step, mean))
        draw.point(place(step, value), "#8899bb")
    if len(smooth) > 1:
        draw.line(smooth, "#cc2222", 2)
    draw.text((width // 2 - 60, height - 30), f"loss, {last + 1} steps", "black")
    image.save(path)
