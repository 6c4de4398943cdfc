"""Cells and tables of what `status`, `top` and `doctor` draw: short numbers, and no word that could rule the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from ernie_cluster.cli.remote import printable

_BAR_CHARS = 8


def bare_table(names: Sequence[str], is_right: Sequence[bool], widths: Sequence[int | None] | None = None) -> Table:
    """Columns without lines between them, each as wide as said, or as needed."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name, right, width in zip(names, is_right, widths or [None] * len(names), strict=True):
        table.add_column(name, justify="right" if right else "left", width=width)
    return table


def plain(text: str) -> Text:
    """A word from elsewhere, without a style."""
    return Text(clean(text))


def clean(text: str) -> str:
    """In one line, and without what could rule the terminal."""
    return " ".join(printable(text).split())


def number(value: float) -> str:
    """A count or a rate in seven characters at most, up to 10 ** 12: 12,345 or 1.2M."""
    for unit, size in (("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:,.0f}"


def latency(seconds: float | None) -> str:
    """31 ms, 2.5 s, or "-" where none was measured."""
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def duration(seconds: float) -> str:
    """Seconds in a unit that keeps it short: 0.3 s, 12 s, 5 min, 3 h, 2 d."""
    if seconds < 1:
        return f"{max(seconds, 0.0):.1f} s"
    for limit_s, unit_s, unit in ((60, 1, "s"), (3600, 60, "min"), (86_400, 3600, "h"), (math.inf, 86_400, "d")):
        if seconds < limit_s:
            return f"{seconds / unit_s:.0f} {unit}"
    raise AssertionError("infinity is above all")


def kv_bar(num_used: int, num_blocks: int) -> Text:
    """A bar of the KV blocks in use; "-" where there are none."""
    if not num_blocks:
        return Text("-")
    used = num_used / num_blocks
    bar = ("#" * round(_BAR_CHARS * used)).ljust(_BAR_CHARS, ".")[:_BAR_CHARS]
    return Text(f"{bar} {used:4.0%}", style="green" if used < 0.7 else "yellow" if used < 0.9 else "red")
