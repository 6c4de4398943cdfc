"""A run over time, as an SVG: requests by what became of them, tokens, TTFT and ITL."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ernie_cluster.bench.plot import Panel, Series, drawn
from ernie_cluster.bench.sketch import Sketch
from ernie_cluster.bench.tally import Tally, merged

MOST_POINTS = 240


def windows(seconds: Mapping[int, Tally], most: int = MOST_POINTS) -> tuple[int, list[Tally]]:
    """(seconds per window, one tally for each window from the first second to the last); `most` of them at most."""
    if not seconds:
        return 1, []
    first, last = min(seconds), max(seconds)
    width = -(-(last - first + 1) // most)
    starts = range(first, last + 1, width)
    return width, [merged(seconds[s] for s in range(a, a + width) if s in seconds) for a in starts]


def plotted(seconds: Mapping[int, Tally]) -> str:
    """An SVG file of a book's seconds."""
    width, parts = windows(seconds)
    parts = parts or [Tally()]
    times_s = [float(i * width) for i in range(len(parts) + 1)]

    def series(name: str, color: str, of: Callable[[Tally], float | None]) -> Series:
        values = [of(tally) for tally in parts]
        return Series(name, color, [*values, values[-1]])

    def rate(count: Callable[[Tally], int]) -> Callable[[Tally], float]:
        return lambda tally: count(tally) / width

    def percentile(sketch: Callable[[Tally], Sketch], share: float) -> Callable[[Tally], float | None]:
        def of(tally: Tally) -> float | None:
            value_s = sketch(tally).percentile(share)
            return None if value_s is None else value_s * 1e3

        return of

    outcomes = (
        series("within the SLO", "#2a9d55", rate(lambda t: t.num_good)),
        series("late", "#e0a030", rate(lambda t: t.num_whole - t.num_good)),
        series("errors", "#c0392b", rate(lambda t: t.num_errors)),
    )
    tokens = (series("output", "#2b6cb0", rate(lambda t: t.num_tokens)),)
    ttft = tuple(
        series(f"p{share:.0%}".removesuffix("%"), color, percentile(lambda t: t.ttft, share))
        for share, color in ((0.5, "#2b6cb0"), (0.9, "#c0392b"))
    )
    itl = tuple(
        series(f"p{share:.0%}".removesuffix("%"), color, percentile(lambda t: t.itl, share))
        for share, color in ((0.5, "#2b6cb0"), (0.99, "#c0392b"))
    )
    return drawn(
        times_s,
        [
            Panel("requests that ended", "/s", areas=outcomes),
            Panel("tokens", "/s", lines=tokens),
            Panel("time to first token", "ms", lines=ttft),
            Panel("inter-token latency", "ms", lines=itl),
        ],
    )
