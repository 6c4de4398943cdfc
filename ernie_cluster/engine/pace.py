"""How long work takes as a line: so much whatever it is, and so much for each token. Fitted to what was measured lately."""

from __future__ import annotations

from typing import NamedTuple

_MEMORY = 0.98
"""What each measurement leaves of the weight of those before it: about fifty count."""
_LEAST_S = 1e-5
"""Shorter work counts as this long."""


class Line(NamedTuple):
    """Seconds of a piece of work."""

    fixed_s: float
    each_s: float


class Pace:
    """Least squares over the last measurements of the shares by which they are missed, neither part below 0: were it
    seconds, long pieces of work would say what short ones take."""

    def __init__(self) -> None:
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def note(self, size: int, seconds: float) -> None:
        """A piece of work of `size` took so long."""
        keep, weight = _MEMORY, max(seconds, _LEAST_S) ** -2
        self._n = keep * self._n + weight
        self._x = keep * self._x + weight * size
        self._y = keep * self._y + weight * seconds
        self._xx = keep * self._xx + weight * size * size
        self._xy = keep * self._xy + weight * size * seconds

    @property
    def line(self) -> Line | None:
        """None before the first measurement. Where all sizes were alike, every part is taken for each."""
        if not self._n:
            return None
        spread = self._n * self._xx - self._x * self._x
        if spread > 1e-6 * self._n * self._xx:
            each_s = (self._n * self._xy - self._x * self._y) / spread
            fixed_s = (self._y - each_s * self._x) / self._n
            if each_s >= 0 and fixed_s >= 0:
                return Line(fixed_s, each_s)
            if each_s < 0:
                return Line(self._y / self._n, 0.0)
        return Line(0.0, self._xy / self._xx)
