"""Requests whose outcomes somebody is still to get though nothing of them is left: their KV was handed over, and that is told
to nobody. They are closed a while later, when the last of their outcomes is out for certain."""

from __future__ import annotations

from collections.abc import Iterable

SETTLE_S = 10.0
"""From the end of a request on an engine until nothing can be said of it any more."""


class Strays:
    """Who was gone when it was last looked, and since when."""

    def __init__(self) -> None:
        self._since_s: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._since_s)

    def over(self, gone: Iterable[str], now_s: float) -> list[str]:
        """Those that have been gone for long enough.

        Args:
            gone: open requests of which nothing is left on the engine.
            now_s: monotonic.
        """
        self._since_s = {key: self._since_s.get(key, now_s) for key in gone}
        return [key for key, since_s in self._since_s.items() if now_s - since_s >= SETTLE_S]
