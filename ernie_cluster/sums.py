"""Measured durations against sizes, and the line through them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sums:
    """Measured durations against sizes, as sums, so that they add up over replicas and fade with time."""

    n: float = 0.0
    x: float = 0.0
    t: float = 0.0
    xx: float = 0.0
    xt: float = 0.0

    @staticmethod
    def of(*points: tuple[float, float]) -> Sums:
        """Of (size, seconds) each."""
        total = Sums()
        for x, t in points:
            total = total + Sums(1.0, x, t, x * x, x * t)
        return total

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.n + other.n, self.x + other.x, self.t + other.t, self.xx + other.xx, self.xt + other.xt)

    def faded(self, factor: float) -> Sums:
        return Sums(self.n * factor, self.x * factor, self.t * factor, self.xx * factor, self.xt * factor)

    @property
    def line(self) -> tuple[float, float]:
        """(seconds at size 0, seconds per unit of size): least squares, neither of them negative.

        Where all sizes were alike, nothing says how it grows: it is taken not to, until larger ones are seen.
        """
        if not self.n:
            return 0.0, 0.0
        spread = self.xx * self.n - self.x * self.x
        slope = (self.xt * self.n - self.x * self.t) / spread if spread > 1e-6 * self.xx * self.n else 0.0
        slope = min(max(slope, 0.0), self.t / self.x if self.x else 0.0)
        return max(0.0, self.t - slope * self.x) / self.n, slope

    @property
    def variation(self) -> float:
        """Squared coefficient of variation of the sizes."""
        return max(0.0, self.xx * self.n / (self.x * self.x) - 1.0) if self.x else 0.0
