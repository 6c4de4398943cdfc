"""Panels over time as SVG: lines and stacked areas, one below the other. Knows nothing of what is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, HEIGHT, LEFT, TOP, GAP = 720, 110, 60, 30, 50
_LEGEND_STEP = 150


@dataclass(frozen=True, slots=True)
class Series:
    """Values at the times of its panel."""

    name: str
    color: str
    values: Sequence[float | None]
    """None where there is nothing to show."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture with an axis of its own."""

    title: str
    unit: str
    areas: Sequence[Series] = ()
    """Drawn on top of each other, the first lowest, in steps."""
    lines: Sequence[Series] = ()


def drawn(times_s: Sequence[float], panels: Sequence[Panel], shades: Sequence[tuple[float, float, str]] = ()) -> str:
    """An SVG file.

    Args:
        times_s: ascending, at least two.
        shades: (from, to, words) behind all panels, in seconds.
    """
    parts: list[str] = []
    for i, panel in enumerate(panels):
        parts += _panel(
            times_s, panel, TOP + i * (HEIGHT + GAP), shades if i == 0 else [(a, b, "") for a, b, _ in shades]
        )
    height = TOP + len(panels) * (HEIGHT + GAP)
    width = LEFT + WIDTH + 20
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
    return head + 'font-family="sans-serif" font-size="12">\n' + "\n".join(parts) + "\n</svg>\n"


def _panel(times_s: Sequence[float], panel: Panel, y0: float, shades: Sequence[tuple[float, float, str]]) -> list[str]:
    end_s = times_s[-1]
    top = _top([*_stacked(panel.areas)[-1:], *(s.values for s in panel.lines)])

    def x(at_s: float) -> float:
        return LEFT + WIDTH * min(at_s, end_s) / end_s

    def y(value: float) -> float:
        return y0 + HEIGHT * (1 - min(value, top) / top)

    parts = []
    for start_s, stop_s, words in shades:
        wide = x(stop_s) - x(start_s)
        parts.append(f'<rect x="{x(start_s):.1f}" y="{y0}" width="{wide:.1f}" height="{HEIGHT}" fill="#eee"/>')
        parts.append(f'<text x="{x(start_s) + 4:.1f}" y="{y0 + 14}" fill="#888">{escape(words)}</text>')
    floor: Sequence[float] = [0.0] * len(times_s)
    for series, ceiling in zip(panel.areas, _stacked(panel.areas), strict=True):
        there = _steps(times_s, ceiling)
        back = _steps(times_s, floor)[::-1]
        points = " ".join(f"{x(t):.1f},{y(v):.1f}" for t, v in there + back)
        parts.append(f'<polygon points="{points}" fill="{series.color}" fill-opacity="0.7"/>')
        floor = ceiling
    for series in panel.lines:
        points = " ".join(
            f"{x(t):.1f},{y(v):.1f}" for t, v in zip(times_s, series.values, strict=True) if v is not None
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{series.color}" stroke-width="1.5"/>')
    parts.append(f'<rect x="{LEFT}" y="{y0}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#888"/>')
    parts.append(f'<text x="{LEFT}" y="{y0 - 8}" font-weight="bold">{escape(panel.title)}</text>')
    for i, series in enumerate((*panel.areas, *panel.lines)):
        at = LEFT + WIDTH - _LEGEND_STEP * (len(panel.areas) + len(panel.lines) - i)
        parts.append(f'<rect x="{at}" y="{y0 - 17}" width="10" height="10" fill="{series.color}"/>')
        parts.append(f'<text x="{at + 14}" y="{y0 - 8}">{escape(series.name)}</text>')
    parts += [
        f'<text x="{LEFT - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:g} {panel.unit}</text>' for v in (0.0, top)
    ]
    parts.append(f'<text x="{LEFT + WIDTH}" y="{y0 + HEIGHT + 16}" text-anchor="end">{end_s:.0f} s</text>')
    return parts


def _stacked(areas: Sequence[Series]) -> list[list[float]]:
    """The upper edge of each area."""
    edges: list[list[float]] = []
    for series in areas:
        below = edges[-1] if edges else [0.0] * len(series.values)
        edges.append([b + (v or 0.0) for b, v in zip(below, series.values, strict=True)])
    return edges


def _steps(times_s: Sequence[float], values: Sequence[float]) -> list[tuple[float, float]]:
    """Corners of a line that holds each value until the next time."""
    corners = [(times_s[0], values[0])]
    for (_, before), (at_s, value) in pairwise(zip(times_s, values, strict=True)):
        corners += [(at_s, before), (at_s, value)]
    return corners


def _top(curves: Sequence[Sequence[float | None]]) -> float:
    """Of the axis: 1, 2 or 5 times a power of ten that no value passes."""
    most = max((v for curve in curves for v in curve if v is not None), default=0.0)
    scale = 1e-3
    while True:
        for factor in (1, 2, 5):
            if factor * scale >= most:
                return factor * scale
        scale *= 10
