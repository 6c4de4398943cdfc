"""What an experiment has found: counts, times, and the verdict. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from ernie_cluster.chaos.load import References
from ernie_cluster.chaos.stream import Outcome

_SHOWN = 8
"""Troubles that the text names."""


@dataclass(frozen=True, slots=True)
class Struck:
    """One fault of an experiment."""

    name: str
    victim: str
    did_strike: bool
    """False where nothing came by its point in time; then the rest says nothing."""
    recovered_s: float | None
    """From the strike until all replicas were ready again and an answer that began after it was whole; None = it took too
    long."""


@dataclass(frozen=True, slots=True)
class Figures:
    """One phase of the load."""

    requests: int
    lost: int
    """Ended as no answer may: an error, silence, or a connection that broke."""
    wrong: int
    """Whole, and another answer than in calm."""
    hung: int
    refused: int
    """Times that clients were told to come back, and did."""
    broken: int
    """Connections that broke and were made again."""
    total_p50_s: float
    total_p99_s: float
    added_p50_s: float
    """Beyond the median of the same prompt in calm."""
    added_p99_s: float
    longest_gap_s: float
    """Between two pieces of one answer."""
    troubles: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """An experiment from calm to calm."""

    model: str
    seed: int
    calm: Figures
    faulty: Figures
    after: Figures
    faults: tuple[Struck, ...]
    leaks: str
    """What did not come back; "" if everything did."""
    settled_s: float
    """From the end of the load until everything had come back."""
    unsteady: tuple[str, ...]
    """Prompts that cannot be judged."""

    @property
    def objections(self) -> list[str]:
        """Why it failed; empty if it passed."""
        phases = {"calm": self.calm, "under faults": self.faulty, "afterwards": self.after}
        found = [
            f"{count} {what} {when}"
            for when, figures in phases.items()
            for what, count in (("lost", figures.lost), ("wrong", figures.wrong), ("hung", figures.hung))
            if count
        ]
        found += [f"no recovery from: {f.name}" for f in self.faults if f.did_strike and f.recovered_s is None]
        if not self.calm.requests or len(self.unsteady) == self.calm.requests:
            found.append("nothing could be judged")
        return [*found, *([f"not given back: {self.leaks}"] if self.leaks else [])]

    def to_json(self) -> dict[str, Any]:
        """Everything, and the verdict."""
        return {**asdict(self), "objections": self.objections, "passed": not self.objections}

    def text(self) -> str:
        """For people."""
        rows: list[tuple[str, ...]] = [("", "calm", "under faults", "afterwards")]
        phases = (self.calm, self.faulty, self.after)
        rows += [
            (name, *(str(getattr(p, name)) for p in phases))
            for name in ("requests", "lost", "wrong", "hung", "refused", "broken")
        ]
        rows += [
            (label, *(f"{getattr(p, name):.2f}" for p in phases))
            for label, name in (
                ("whole answer p50, s", "total_p50_s"),
                ("whole answer p99, s", "total_p99_s"),
                ("added latency p50, s", "added_p50_s"),
                ("added latency p99, s", "added_p99_s"),
                ("longest gap, s", "longest_gap_s"),
            )
        ]
        lines = ["  ".join([row[0].ljust(22), *(cell.rjust(12) for cell in row[1:])]) for row in rows]
        lines += ["", "faults, and seconds until everything was whole and answered again:"]
        for fault in self.faults:
            took = "did not strike: nothing came by" if not fault.did_strike else "NOT RECOVERED"
            if fault.did_strike and fault.recovered_s is not None:
                took = f"{fault.recovered_s:.1f}"
            lines.append(f"  {fault.name.ljust(34)} {took.rjust(6)}   {fault.victim}")
        lines += [f"prompts whose calm answers differ, not judged: {', '.join(self.unsteady)}"] if self.unsteady else []
        troubles = [*self.calm.troubles, *self.faulty.troubles, *self.after.troubles]
        lines += [f"  {trouble}" for trouble in troubles[:_SHOWN]]
        lines.append("given back: " + (self.leaks or f"everything, {self.settled_s:.1f} s after the load"))
        return "\n".join([*lines, "", "FAILED: " + "; ".join(self.objections) if self.objections else "passed"])


def calm_medians(outcomes: Iterable[Outcome]) -> dict[str, float]:
    """Median seconds of a whole answer, by prompt."""
    times: defaultdict[str, list[float]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.kind == "whole":
            times[outcome.prompt].append(outcome.total_s)
    return {prompt: median(each) for prompt, each in times.items()}


def figures(
    outcomes: Sequence[Outcome], expected: References, medians: Mapping[str, float], *, may_break: bool
) -> Figures:
    """Of one phase.

    Args:
        medians: see `calm_medians`.
        may_break: whether connections may break, because API processes are killed.
    """
    lost = [o for o in outcomes if o.kind == "lost" or (o.num_broken and not may_break)]
    wrong = [o for o in outcomes if expected.is_wrong(o)]
    hung = [o for o in outcomes if o.kind == "hung"]
    totals = [o.total_s for o in outcomes if o.kind == "whole"]
    added = [o.total_s - medians[o.prompt] for o in outcomes if o.kind == "whole" and o.prompt in medians]
    troubles = [f"{o.prompt}: {o.trouble or 'the connection broke'}" for o in (*lost, *hung)]
    troubles += [f"{o.prompt}: {o.answer} instead of {expected.answers[o.prompt]}"[:600] for o in wrong]
    return Figures(
        requests=len(outcomes),
        lost=len(lost),
        wrong=len(wrong),
        hung=len(hung),
        refused=sum(o.num_refused for o in outcomes),
        broken=sum(o.num_broken for o in outcomes),
        total_p50_s=percentile(totals, 0.5),
        total_p99_s=percentile(totals, 0.99),
        added_p50_s=percentile(added, 0.5),
        added_p99_s=percentile(added, 0.99),
        longest_gap_s=max((o.longest_gap_s for o in outcomes), default=0.0),
        troubles=tuple(troubles),
    )


def percentile(values: Sequence[float], share: float) -> float:
    """The value that so many are at most as large as; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
