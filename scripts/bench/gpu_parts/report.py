"""What was measured: rows, as a table, as Markdown for BENCHMARKS.md, as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True, slots=True)
class Row:
    """One figure."""

    what: str
    measured: str
    share: float | None = None
    """Of the bound."""
    goal: float | None = None
    """Least share."""
    note: str = ""

    @property
    def is_missed(self) -> bool:
        return self.share is not None and self.goal is not None and self.share < self.goal


@dataclass(slots=True)
class Report:
    """Rows in the order in which they came."""

    machine: str
    date: str
    command: str
    rows: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Keep and print it: a suite that is cut short has said what it knew."""
        self.rows.append(row)
        print("  ".join(_cells(row)).rstrip(), flush=True)

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def as_markdown(self) -> str:
        """A section of BENCHMARKS.md."""
        lines = [
            f"## GPU: {self.machine}",
            "",
            f"`{self.command}`, {self.date}. Shares are of the bound measured in the same run.",
            "",
            "| | measured | share of the bound | goal | |",
            "| --- | --- | --- | --- | --- |",
        ]
        return "\n".join([*lines, *(f"| {' | '.join(_cells(row))} |" for row in self.rows)])

    @property
    def table(self) -> str:
        rows = [_cells(row) for row in self.rows]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
        return "\n".join(_line(row, widths) for row in rows)


def _cells(row: Row) -> list[str]:
    share = "" if row.share is None else f"{row.share:.0%}"
    goal = "" if row.goal is None else f">= {row.goal:.0%}" + (" MISSED" if row.is_missed else "")
    return [row.what, row.measured, share, goal, row.note]


def _line(cells: Iterable[str], widths: list[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
