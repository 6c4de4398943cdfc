"""What is promised to clients, and how fast the room for error may be used up: several windows, each long and short.

An objective says which part of the requests of a month has to be good. The rest is its budget; a burn rate of 1 uses it up in
exactly that month. An alert wants the same rate in a long window (that it matters) and in a short one (that it goes on still).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FIRST_TOKEN_S = 2.5
"""A first token that comes later is late; one of the bounds of the histogram's buckets."""

BAD = "replica_error|internal_error|deadline_exceeded"
"""Outcomes that are a fault of ours. What clients do wrong, and what is refused with a time to come back, is none."""


@dataclass(frozen=True, slots=True)
class Objective:
    """One promise, kept for each model by itself."""

    name: str
    """Of its alerts, in CamelCase."""
    measure: str
    """What its recorded series begin with."""
    share: float
    """Part of the requests that has to be good, below 1."""
    bad: str
    """Bad requests per second in a window, which stands for `WINDOW`."""
    judged: str
    """All that count, alike."""

    def record(self, window: str) -> str:
        """Name of the series with the part of the requests of a window that was bad."""
        return f"{self.measure}:ratio_rate{window}"

    def ratio(self, window: str) -> str:
        """What is recorded under that name."""
        return f"({self.bad}) / ({self.judged})".replace("WINDOW", window)

    def burns(self, pace: Pace) -> str:
        """Whether the budget burns as fast as that, of some model."""
        limit = f"{pace.factor * (1 - self.share):.6g}"
        return f"{self.record(pace.long)} > {limit} and {self.record(pace.short)} > {limit}"


@dataclass(frozen=True, slots=True)
class Pace:
    """A burn rate that is too much, and where it is looked for."""

    factor: float
    long: str
    short: str


FAST = (Pace(14.4, "1h", "5m"), Pace(6, "6h", "30m"))
"""2% of a month's budget within an hour, 5% within six: somebody has to get up."""
SLOW = (Pace(3, "1d", "2h"), Pace(1, "3d", "6h"))
"""A tenth of it within one day or three: somebody has to look, by day."""

OBJECTIVES = (
    Objective(
        "Errors",
        "model:ernie_request_errors",
        0.995,
        f'sum by (model) (rate(ernie_request_total{{outcome=~"{BAD}"}}[WINDOW]))',
        f'sum by (model) (rate(ernie_request_total{{outcome=~"success|{BAD}"}}[WINDOW]))',
    ),
    Objective(
        "FirstToken",
        "model:ernie_late_first_tokens",
        0.95,
        "sum by (model) (rate(ernie_time_to_first_token_seconds_count[WINDOW]))"
        f' - sum by (model) (rate(ernie_time_to_first_token_seconds_bucket{{le="{FIRST_TOKEN_S}"}}[WINDOW]))',
        "sum by (model) (rate(ernie_time_to_first_token_seconds_count[WINDOW]))",
    ),
)


def recording_rules() -> list[Mapping[str, Any]]:
    """The part that was bad, of each objective in each window, so that alerts read what is computed once."""
    windows = list(dict.fromkeys(w for pace in (*FAST, *SLOW) for w in (pace.short, pace.long)))
    return [{"record": o.record(window), "expr": o.ratio(window)} for o in OBJECTIVES for window in windows]
