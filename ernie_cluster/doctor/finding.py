"""What a check says: how it stands, what was seen, what it should be, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

Level = Literal["ok", "warning", "problem", "skipped"]
"""warning: it works, though slower or not for ever. problem: it will not work. skipped: nobody can tell, and why."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a report."""

    check: str
    level: Level
    seen: str
    """The value, in words; of a skipped one the reason."""
    bound: str = ""
    """What it should be; empty where there is nothing to compare with."""
    remedy: str = ""
    """What to do; of a warning or a problem always something."""
    node: str = ""
    """Where; empty = the machine that the command runs on, or no machine at all."""

    def on(self, node: str) -> Finding:
        """The same, of a node."""
        return replace(self, node=node)


def exit_code(findings: Iterable[Finding]) -> int:
    """1 where there is a problem, else 0."""
    return int(any(finding.level == "problem" for finding in findings))
