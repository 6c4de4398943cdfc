"""How far it is, on standard error: a line per thing that is being waited for, and a bar for many equal things."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

_BAR_CHARS = 30


class Progress:
    """Callable that prints `[ 12.3 s] text` to standard error."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._start

    def __call__(self, text: str) -> None:
        print(f"[{self.elapsed_s:5.1f} s] {text}", file=sys.stderr, flush=True)


class Bar:
    """A row of equal steps: one line that is rewritten on a terminal, elsewhere one per tenth of the way.

    Args:
        what: the steps, in the plural.
        total: how many there are.
        out: where to; None = standard error.
        clock: seconds from any start.
    """

    def __init__(
        self, what: str, total: int, out: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._what, self._total, self._done = what, total, 0
        self._out, self._clock = out or sys.stderr, clock
        self._start, self._is_terminal = clock(), self._out.isatty()

    def step(self) -> None:
        """One more is done."""
        self._done += 1
        done, total = self._done, self._total
        if self._is_terminal:
            print(f"\r\x1b[K{self._text()}", end="", file=self._out, flush=True)
        elif done == total or done * 10 // total != (done - 1) * 10 // total:
            print(self._text(), file=self._out, flush=True)

    def say(self, text: str) -> None:
        """A line of its own, beside the bar."""
        print(f"\r\x1b[K{text}" if self._is_terminal else text, file=self._out, flush=True)

    def close(self) -> None:
        """Let what follows begin a new line."""
        if self._is_terminal and self._done:
            print(file=self._out)

    def _text(self) -> str:
        share = self._done / self._total
        left_s = round((self._clock() - self._start) / self._done * (self._total - self._done))
        bar = ("#" * round(_BAR_CHARS * share)).ljust(_BAR_CHARS, ".")
        return f"[{bar}] {self._done:,}/{self._total:,} {self._what}, {left_s // 60}:{left_s % 60:02} to go"
