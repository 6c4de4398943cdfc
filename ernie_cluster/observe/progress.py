"""How far a long transfer of bytes is: a bar on a terminal, a line now and then in a log, nothing where it is short."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

_PATIENCE_S = 2.0
"""What is done by then needs no bar."""

_BAR_WIDTH = 30
_PAUSE_S = {True: 0.2, False: 10.0}
"""Between two reports on a terminal, and elsewhere."""


class ByteProgress:
    """Callable that is told `(bytes done, bytes in all)`, from one thread.

    Args:
        what: stands before the figures.
        out: usually standard error.
        clock: seconds.
    """

    def __init__(self, what: str, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._what, self._out, self._clock = what, out, clock
        self._is_terminal = out.isatty()
        self._start = clock()
        self._next = self._start + _PATIENCE_S
        self._has_spoken = False

    def __call__(self, done: int, total: int) -> None:
        now, is_last = self._clock(), done >= total
        if now < self._next and not (is_last and self._has_spoken):
            return
        self._next = now + _PAUSE_S[self._is_terminal]
        self._has_spoken = True
        rate = done / max(now - self._start, 1e-9)
        text = f"{self._what} {done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate / 1e9:.2f} GB/s"
        if not self._is_terminal:
            self._write(f"{text}\n")
            return
        filled = _BAR_WIDTH * done // max(total, 1)
        self._write(f"\r{text} [{'#' * filled:{_BAR_WIDTH}}]" + ("\n" if is_last else ""))

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()
