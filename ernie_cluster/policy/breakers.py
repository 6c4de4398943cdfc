"""Replicas that fail again and again while they say that they are well get no work for a while, each time a longer one.

It reads no clock: `now_s` comes in. A breaker is closed at first and again after each success. Some failures in a row open
it; when its time is over, one request may try. If that fails too, it is open for twice as long.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ernie_cluster.config.router import RouterConfig

_SAME_S = 0.5
"""What hangs or breaks fails all its requests at once: reports that follow each other so soon count once."""
_MAX_OPEN_S = 30.0
_PROBE_S = 30.0
"""A try of which nobody tells how it ended ends here; the next one may try."""
_MEMORY_S = 300.0
"""Without a failure for this long it is forgotten that there were any."""


@dataclass(slots=True)
class _Breaker:
    num_failures: int = 0
    """In a row."""
    failed_s: float = float("-inf")
    """When the last of them was counted."""
    num_openings: int = 0
    """In a row."""
    until_s: float = float("-inf")
    """It is open until then; later somebody may try, if it ever was."""
    probe_until_s: float = float("-inf")
    """Somebody tries."""


class Breakers:
    """The breakers of all replicas.

    Args:
        limits: how many failures open one, and for how long the first time.
    """

    def __init__(self, limits: RouterConfig) -> None:
        self._limits = limits
        self._breakers: dict[str, _Breaker] = {}

    def failed(self, replica_id: str, now_s: float) -> bool:
        """A replica has failed a request; whether that opens its breaker."""
        self._breakers = {i: b for i, b in self._breakers.items() if now_s - max(b.failed_s, b.until_s) < _MEMORY_S}
        breaker = self._breakers.setdefault(replica_id, _Breaker())
        is_trying = now_s < breaker.probe_until_s
        if now_s < breaker.until_s or (not is_trying and now_s - breaker.failed_s < _SAME_S):
            return False
        breaker.failed_s = now_s
        breaker.num_failures += 1
        if not is_trying and breaker.num_failures < self._limits.breaker_failures:
            return False
        open_s = self._limits.breaker_open_s * 2.0 ** min(breaker.num_openings, 16)
        breaker.num_openings += 1
        breaker.until_s, breaker.probe_until_s = now_s + min(open_s, _MAX_OPEN_S), float("-inf")
        return True

    def succeeded(self, replica_id: str) -> None:
        """It has done its part of a request."""
        self._breakers.pop(replica_id, None)

    def chosen(self, replica_ids: Iterable[str], now_s: float) -> None:
        """A request goes to these; where a breaker's time is over, it is the one that tries."""
        for replica_id in replica_ids:
            breaker = self._breakers.get(replica_id)
            if breaker is not None and breaker.num_openings and now_s >= breaker.until_s:
                breaker.probe_until_s = now_s + _PROBE_S

    def open(self, now_s: float) -> frozenset[str]:
        """Those that get no work now."""
        return frozenset(i for i, b in self._breakers.items() if now_s < max(b.until_s, b.probe_until_s))
