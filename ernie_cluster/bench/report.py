"""What a run has shown, as lines for a terminal and as JSON; of two servers, side by side with ratios."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ernie_cluster.bench.sketch import Sketch
from ernie_cluster.bench.tally import Tally

SHARES = (0.5, 0.9, 0.99)
_KINDS: tuple[tuple[str, str, float, str], ...] = (
    ("TTFT", "ttft", 1e3, "ms"),
    ("ITL", "itl", 1e3, "ms"),
    ("TPOT", "tpot", 1e3, "ms"),
    ("E2E", "latency", 1.0, "s"),
)
_WIDTH = 12


@dataclass(frozen=True, slots=True)
class Side:
    """One server's results."""

    url: str
    model: str
    tally: Tally
    duration_s: float
    """Over which rates are taken."""
    examples: dict[str, str]
    """Kind of error -> what one of them said."""
    lag: Sketch

    def per_s(self, count: float) -> float:
        return count / self.duration_s if self.duration_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Row:
    """One figure; None where there is nothing to measure."""

    name: str
    unit: str
    of: Callable[[Side], float | None]
    decimals: int = 1


def _share_of(side: Side, count: int) -> float | None:
    return 100 * count / side.tally.num_requests if side.tally.num_requests else None


def _rows() -> list[Row]:
    rows = [
        Row("requests", "", lambda s: s.tally.num_requests, 0),
        Row("whole answers", "", lambda s: s.tally.num_whole, 0),
        Row("requests/s", "", lambda s: s.per_s(s.tally.num_whole), 2),
        Row("goodput", "req/s", lambda s: s.per_s(s.tally.num_good), 2),
        Row("  within the SLO", "%", lambda s: _share_of(s, s.tally.num_good)),
        Row("output tokens/s", "", lambda s: s.per_s(s.tally.num_tokens)),
        Row("prompt tokens/s", "", lambda s: s.per_s(s.tally.num_prompt_tokens)),
    ]
    rows += [
        Row(f"{name} p{share * 100:g}", unit, _percentile(attribute, share, scale), 1 if scale > 1 else 2)
        for name, attribute, scale, unit in _KINDS
        for share in SHARES
    ]
    return rows


def _percentile(attribute: str, share: float, scale: float) -> Callable[[Side], float | None]:
    def of(side: Side) -> float | None:
        sketch: Sketch = getattr(side.tally, attribute)
        value_s = sketch.percentile(share)
        return None if value_s is None else value_s * scale

    return of


def lines(sides: Sequence[Side]) -> list[str]:
    """A table; with two sides, what the first is over the second as a third column."""
    heads = [("this" if i == 0 else "other").rjust(_WIDTH) for i in range(len(sides))] if len(sides) > 1 else []
    told = [" " * 24 + "".join(heads) + ("ratio".rjust(_WIDTH) if heads else "")] if heads else []
    for row in _rows():
        values = [row.of(side) for side in sides]
        cells = "".join(("-" if v is None else f"{v:,.{row.decimals}f}").rjust(_WIDTH) for v in values)
        told.append(f"{row.name:<18}{row.unit:>6}{cells}{_ratio(values)}")
    for side, name in zip(sides, ("this", "other"), strict=False):
        told += _errors(side, name if len(sides) > 1 else "")
    return told


def _ratio(values: Sequence[float | None]) -> str:
    if len(values) < 2:
        return ""
    first, second = values[:2]
    return ("-" if first is None or not second else f"{first / second:.2f}x").rjust(_WIDTH)


def _errors(side: Side, name: str) -> list[str]:
    whose = f" of {name}" if name else ""
    told = [f"errors{whose}: {side.tally.num_errors:,}"] if side.tally.num_errors else []
    for kind, count in side.tally.errors.most_common():
        told.append(f"  {count:,} x {kind}: {side.examples.get(kind, '')}")
    return told


def to_json(side: Side) -> dict[str, Any]:
    """All figures under names with units; sketches, too, so that runs can be added up."""
    tally = side.tally
    durations = {}
    for _, attribute, _, _ in _KINDS:
        sketch: Sketch = getattr(tally, attribute)
        shares = {f"p{share * 100:g}": sketch.percentile(share) for share in SHARES}
        durations[f"{attribute}_s"] = {**shares, "mean": sketch.mean_s, "max": sketch.max_s if len(sketch) else None}
    return {
        "url": side.url,
        "model": side.model,
        "duration_s": side.duration_s,
        "requests": tally.num_requests,
        "whole": tally.num_whole,
        "good": tally.num_good,
        "requests_per_s": side.per_s(tally.num_whole),
        "goodput_per_s": side.per_s(tally.num_good),
        "output_tokens": tally.num_tokens,
        "prompt_tokens": tally.num_prompt_tokens,
        "cached_tokens": tally.num_cached_tokens,
        "output_tokens_per_s": side.per_s(tally.num_tokens),
        **durations,
        "errors": {kind: {"count": n, "example": side.examples.get(kind, "")} for kind, n in tally.errors.items()},
        "lag_p99_s": side.lag.percentile(0.99),
        "tally": tally.to_json(),
    }
