"""Counts and durations of many requests, which can be added up: over rounds, over scenarios, over processes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Self

from ernie_cluster.bench.record import Record, Slo
from ernie_cluster.bench.sketch import Sketch

_COUNTS = ("num_requests", "num_good", "num_tokens", "num_prompt_tokens", "num_cached_tokens")
_SKETCHES = ("ttft", "itl", "tpot", "latency")


@dataclass(slots=True)
class Tally:
    """What became of some requests. Durations are those of whole answers; an error's would tell of something else."""

    num_requests: int = 0
    num_good: int = 0
    """Whole, and within the SLO."""
    num_tokens: int = 0
    """Of all answers, broken ones with what came of them."""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    """Kind -> how many."""
    ttft: Sketch = field(default_factory=Sketch)
    itl: Sketch = field(default_factory=Sketch)
    tpot: Sketch = field(default_factory=Sketch)
    latency: Sketch = field(default_factory=Sketch)

    @property
    def num_errors(self) -> int:
        return self.errors.total()

    @property
    def num_whole(self) -> int:
        return self.num_requests - self.num_errors

    def add(self, record: Record, slo: Slo) -> None:
        self.num_requests += 1
        self.num_tokens += record.num_tokens
        self.num_prompt_tokens += record.num_prompt_tokens
        self.num_cached_tokens += record.num_cached_tokens
        self.num_good += slo.is_met(record)
        if record.error:
            self.errors[record.error] += 1
            return
        self.latency.add(record.latency_s)
        self.itl.extend(record.gaps_s)
        if record.ttft_s is not None:
            self.ttft.add(record.ttft_s)
        if record.tpot_s is not None:
            self.tpot.add(record.tpot_s)

    def merge(self, other: Tally) -> None:
        """Take in what another one has counted."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.errors.update(other.errors)
        for name in _SKETCHES:
            getattr(self, name).merge(getattr(other, name))

    def to_json(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in _COUNTS}
        return {**counts, "errors": dict(self.errors), **{name: getattr(self, name).to_json() for name in _SKETCHES}}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Self:
        fields: dict[str, Any] = {name: raw[name] for name in _COUNTS}
        fields |= {name: Sketch.from_json(raw[name]) for name in _SKETCHES}
        return cls(**fields, errors=Counter(raw["errors"]))


def merged(tallies: Iterable[Tally]) -> Tally:
    """All of them as one."""
    whole = Tally()
    for tally in tallies:
        whole.merge(tally)
    return whole


@dataclass(slots=True)
class Book:
    """Tallies of a run by scenario, and by the second in which requests ended. Several processes' books add up."""

    scenarios: defaultdict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    seconds: defaultdict[int, Tally] = field(default_factory=lambda: defaultdict(Tally))
    """By second of the epoch, so that the clocks of all processes should agree to about that."""

    def add(self, record: Record, slo: Slo) -> None:
        self.scenarios[record.scenario].add(record, slo)
        self.seconds[int(record.ended_s)].add(record, slo)

    def merge(self, other: Book) -> None:
        for name, tally in other.scenarios.items():
            self.scenarios[name].merge(tally)
        for second, tally in other.seconds.items():
            self.seconds[second].merge(tally)

    @property
    def total(self) -> Tally:
        return merged(self.scenarios.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "scenarios": {name: tally.to_json() for name, tally in self.scenarios.items()},
            "seconds": {str(second): tally.to_json() for second, tally in self.seconds.items()},
        }

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Self:
        book = cls()
        book.scenarios.update((name, Tally.from_json(tally)) for name, tally in raw["scenarios"].items())
        book.seconds.update((int(second), Tally.from_json(tally)) for second, tally in raw["seconds"].items())
        return book
