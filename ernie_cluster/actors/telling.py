"""A rank's side of the router's question what is new: answered when something is, or when nothing was for a while."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from ernie_cluster.actors.messages import Load, Told
from ernie_cluster.config.router import RouterConfig
from ernie_cluster.deltas import Delta

_QUIET_S = 1.0
"""A rank at rest shows this often that it lives."""


class Teller:
    """Compares what is with what was told last, so that a rank at rest costs the router one message a second.

    Args:
        load: of this rank now; what it raises goes to the router.
        cached: how its cache has changed since a version.
        limits: how often to look, and how long silence may last.
    """

    def __init__(self, load: Callable[[], Load], cached: Callable[[int | None], Delta], limits: RouterConfig) -> None:
        self._load, self._cached = load, cached
        self._pause_s = limits.snapshot_interval_s
        self._quiet_s = min(_QUIET_S, limits.heartbeat_timeout_s / 4)
        self._last: Load | None = None

    async def tell(self, seen: int | None) -> Told:
        """What is new; `seen` is the version of the cache that is known, None = nothing is."""
        asked = time.monotonic()
        while True:
            load, cached = self._load(), self._cached(seen)
            held_s = time.monotonic() - asked
            if load != self._last or not cached.is_empty or held_s >= self._quiet_s:
                self._last = load
                return Told(load, cached, held_s)
            await asyncio.sleep(self._pause_s)
