"""What an evaluation came to: results in, report and tables out. Pure; knows no server and no skill."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

CONTROLS = frozenset({"zoom_blind"})
"""Skills that show what guessing gives; they stand below the total and do not count in it."""

Key = tuple[str, str, int]
"""Skill, language and seed of a question."""


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one question."""

    skill: str
    language: str
    seed: int
    question: str
    wanted: str
    """The right call, where one is due, and the right answer: a line each, as in `got`."""
    got: str = ""
    """All that was said: a line per answer or call."""
    thought: str = ""
    """Reasoning, word for word."""
    is_right: bool = False
    error: str = ""
    """Why there is no answer; "" when there is one."""
    latency_s: float = 0.0
    """Of the whole, tools included."""
    num_calls_due: int = 0
    num_calls_formed: int = 0
    """Of those due, calls that named a tool on offer and could be run."""
    iou: float | None = None
    """Overlap of the box with the right one, where one is asked for."""

    @property
    def key(self) -> Key:
        return self.skill, self.language, self.seed

    @property
    def words(self) -> tuple[str, str, str]:
        """What two evaluations must share to have the same answer."""
        return self.got, self.thought, self.error


@dataclass(frozen=True, slots=True)
class Row:
    """One skill in one language, or all of them. Questions without an answer are counted in `num_errors` only."""

    skill: str
    language: str
    num: int
    """Answered questions."""
    num_right: int
    num_errors: int
    num_calls_due: int
    num_calls_formed: int
    mean_iou: float | None
    median_latency_s: float

    @property
    def accuracy(self) -> float:
        """0 when nothing was answered."""
        return self.num_right / max(1, self.num)

    @property
    def share_of_asked(self) -> float:
        """Right answers over all questions, those without an answer included."""
        return self.num_right / max(1, self.num + self.num_errors)


@dataclass(frozen=True, slots=True)
class Report:
    """All rows, and their sum."""

    rows: tuple[Row, ...]
    total: Row
    """Over all rows but `CONTROLS`."""
    first_error: str
    """"" when every question was answered."""


def score(results: Sequence[Result]) -> Report:
    """Rows in the order in which skill and language first appear."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.skill, result.language), []).append(result)
    counted = [r for r in results if r.skill not in CONTROLS]
    first_error = next((r.error for r in results if r.error), "")
    return Report(tuple(_row(*key, group) for key, group in groups.items()), _row("all", "", counted), first_error)


def _row(skill: str, language: str, results: Sequence[Result]) -> Row:
    answered = [r for r in results if not r.error]
    overlaps = [r.iou for r in answered if r.iou is not None]
    return Row(
        skill,
        language,
        num=len(answered),
        num_right=sum(r.is_right for r in answered),
        num_errors=len(results) - len(answered),
        num_calls_due=sum(r.num_calls_due for r in answered),
        num_calls_formed=sum(r.num_calls_formed for r in answered),
        mean_iou=statistics.fmean(overlaps) if overlaps else None,
        median_latency_s=statistics.median(r.latency_s for r in answered) if answered else 0.0,
    )


def wilson(num_right: int, num: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share.

    Args:
        num_right, num: `num_right` of `num` trials succeeded.
        z: width in standard deviations; 1.96 for 95 %.

    Returns:
        Lower and upper bound within [0, 1]; all of it when nothing was tried. 8 of 10 give (0.490, 0.943).
    """
    if num == 0:
        return 0.0, 1.0
    share, spread = num_right / num, z * z / num
    middle = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / num + spread / num / 4)
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


@dataclass(frozen=True, slots=True)
class Difference:
    """Two evaluations of the same questions."""

    skill: str
    language: str
    num: int
    """Questions in both."""
    accuracy_before: float
    accuracy: float
    num_different: int
    """Answers, thoughts or errors that are not the same word for word."""


def compare(before: Iterable[Result], after: Iterable[Result]) -> list[Difference]:
    """A difference per skill and language over the questions that both have, and the sum of all as the last one."""
    earlier: Mapping[Key, Result] = {r.key: r for r in before}
    pairs = [(earlier[r.key], r) for r in after if r.key in earlier]
    groups: dict[tuple[str, str], list[tuple[Result, Result]]] = {}
    for pair in pairs:
        groups.setdefault((pair[1].skill, pair[1].language), []).append(pair)
    return [_difference(*key, group) for key, group in groups.items()] + [_difference("all", "", pairs)]


def _difference(skill: str, language: str, pairs: Sequence[tuple[Result, Result]]) -> Difference:
    num = max(1, len(pairs))
    return Difference(
        skill,
        language,
        num=len(pairs),
        accuracy_before=sum(old.is_right for old, _ in pairs) / num,
        accuracy=sum(new.is_right for _, new in pairs) / num,
        num_different=sum(old.words != new.words for old, new in pairs),
    )


_LEFT = frozenset({"skill", "language"})


def score_lines(report: Report) -> list[str]:
    """The report as a table; columns that nothing fills are left out."""
    counted = [row for row in report.rows if row.skill not in CONTROLS]
    controls = [row for row in report.rows if row.skill in CONTROLS]
    ruled = [len(counted)] if counted else []
    lines = _table([_cells(row) for row in (*counted, *([report.total] if counted else []), *controls)], ruled)
    if report.first_error:
        lines += ["", f"first error: {report.first_error}"]
    return lines


def _cells(row: Row) -> dict[str, str]:
    low, high = wilson(row.num_right, row.num)
    return {
        "skill": row.skill,
        "language": row.language,
        "right": f"{row.num_right:,}/{row.num:,}",
        "accuracy": _percent(row.accuracy) if row.num else "",
        "95 % interval": f"{100 * low:.1f} to {_percent(high)}" if row.num else "",
        "calls formed": _percent(row.num_calls_formed / row.num_calls_due) if row.num_calls_due else "",
        "mean IoU": f"{row.mean_iou:.2f}" if row.mean_iou is not None else "",
        "median": f"{row.median_latency_s:.2f} s" if row.num else "",
        "errors": f"{row.num_errors:,}" if row.num_errors else "",
    }


def difference_lines(differences: Sequence[Difference]) -> list[str]:
    """The comparison as a table."""
    rows = [
        {
            "skill": d.skill,
            "language": d.language,
            "questions": f"{d.num:,}",
            "before": _percent(d.accuracy_before),
            "now": _percent(d.accuracy),
            "change": f"{100 * (d.accuracy - d.accuracy_before):+.1f}",
            "other words": f"{d.num_different:,}",
        }
        for d in differences
    ]
    return _table(rows, [len(rows) - 1])


def _table(rows: Sequence[Mapping[str, str]], ruled: Sequence[int]) -> list[str]:
    """Aligned columns with a heading, and a rule under it and above each row in `ruled`."""
    names = [name for name in rows[0] if any(row[name] for row in rows)] if rows else []
    widths = [max(len(name), *(len(row[name]) for row in rows)) for name in names]
    rule = "  ".join("-" * width for width in widths)

    def line(cells: Iterable[str]) -> str:
        aligned = (c.ljust(w) if n in _LEFT else c.rjust(w) for c, n, w in zip(cells, names, widths, strict=True))
        return "  ".join(aligned).rstrip()

    lines = [line(names), rule] if names else []
    for i, row in enumerate(rows):
        lines += [rule] * (i in ruled) + [line(row[name] for name in names)]
    return lines


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
