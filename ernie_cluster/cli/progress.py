"""One line per thing that is being waited for, with the seconds since the start."""

from __future__ import annotations

import sys
import time


class Progress:
    """Callable that prints `[ 12.3 s] text` to standard error."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._start

    def __call__(self, text: str) -> None:
        print(f"[{self.elapsed_s:5.1f} s] {text}", file=sys.stderr, flush=True)
