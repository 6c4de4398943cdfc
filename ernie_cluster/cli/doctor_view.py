"""Findings for people: one line each, and below what is not well its bound and remedy. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from rich.text import Text

from ernie_cluster.cli.cells import clean
from ernie_cluster.doctor.checks import CHECKS
from ernie_cluster.doctor.finding import Finding, Level

_STYLES: dict[Level, str] = {"ok": "green", "warning": "yellow", "problem": "bold red", "skipped": "dim"}
_LEVEL_CHARS = max(map(len, _STYLES)) + 2
_NAME_CHARS = max(len(check.name) for check in CHECKS) + 2


def render(findings: Sequence[Finding]) -> Text:
    """In their order, and how many there are of each level."""
    return Text("\n").join([*(line for finding in findings for line in _lines(finding)), Text(), _sum(findings)])


def _lines(finding: Finding) -> Iterator[Text]:
    line = Text(finding.level.ljust(_LEVEL_CHARS), style=_STYLES[finding.level])
    line.append(finding.check.ljust(_NAME_CHARS), style="not bold default")
    where = f"{clean(finding.node)}: " if finding.node else ""
    line.append(where + clean(finding.seen), style="not bold")
    yield line
    if finding.level in ("warning", "problem"):
        for word, text in (("should be", finding.bound), ("remedy", finding.remedy)):
            if text:
                yield Text(f"{'':{_LEVEL_CHARS + _NAME_CHARS}}{word}: {clean(text)}")


def _sum(findings: Sequence[Finding]) -> Text:
    counts = Counter(finding.level for finding in findings)
    words = [f"{counts[level]} {level}" for level in _STYLES if counts[level]]
    return Text(", ".join(words) or "nothing was checked", style="bold")


def listed() -> Text:
    """All checks, for --list."""
    return Text("\n").join([Text(f"{check.name.ljust(_NAME_CHARS)}{check.what}") for check in CHECKS])
