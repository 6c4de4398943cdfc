"""Stop strings, searched for while the text arrives in pieces."""

from __future__ import annotations

from collections.abc import Iterable


class StopStringFilter:
    """Passes text on up to the first stop string, and never any part of one.

    "First" is the one that is complete first; of several that end at the same character, the longest. The result
    therefore does not depend on how the text is cut into pieces. Held back is only the longest end of the text that
    may yet become a stop string.

    Args:
        stops: non-empty strings.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._matchers = [_Matcher(stop) for stop in stops]
        self._held = ""
        self.matched: str | None = None
        """The stop string that ended the text; from then on nothing passes."""

    def push(self, text: str) -> str:
        """Take the next piece; return what may be shown now."""
        if self.matched is not None or not self._matchers:
            return "" if self.matched is not None else text
        buffer = self._held + text
        for i, char in enumerate(text, start=len(self._held)):
            hits = [m.stop for m in self._matchers if m.step(char)]
            if hits:
                self.matched = max(hits, key=len)
                self._held = ""
                return buffer[: i + 1 - len(self.matched)]
        num_shown = len(buffer) - max(m.length for m in self._matchers)
        self._held = buffer[num_shown:]
        return buffer[:num_shown]

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


class _Matcher:
    """Knuth-Morris-Pratt: `length` characters at the end of the text so far are the beginning of `stop`."""

    def __init__(self, stop: str) -> None:
        assert stop
        self.stop = stop
        self.length = 0
        self._border = [0]  # [i]: the longest proper prefix of stop[:i + 1] that also ends it
        for char in stop[1:]:
            self._border.append(self._next(self._border[-1], char))

    def _next(self, length: int, char: str) -> int:
        while length and self.stop[length] != char:
            length = self._border[length - 1]
        return length + (self.stop[length] == char)

    def step(self, char: str) -> bool:
        """Take one character; True when `stop` is complete. Not to be called again after that."""
        self.length = self._next(self.length, char)
        return self.length == len(self.stop)
