"""When a draining rank parts with what it still has, so that others go on with it. Lives on the actor's event loop."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from ernie_cluster.actors.duty import Duty
from ernie_cluster.errors import OrderRefused

HEARD_S = 0.25
"""In which the router hears that a replica leaves, whose process was told to end: until then it would send others there, and
send nobody for what is cached there."""


class Parting:
    """Owns one timer.

    Args:
        duty: of the rank.
        part: ends all requests here, and refuses new ones.
        stay: takes requests again.
    """

    def __init__(self, duty: Duty, part: Callable[[], None], stay: Callable[[], None]) -> None:
        self._duty, self._part, self._stay = duty, part, stay
        self._timer: asyncio.Handle | None = None
        self._at_s = math.inf
        """When the timer ends, on the loop's clock; uvloop's handles do not tell."""

    def drain(self, is_draining: bool, within_s: float | None = None) -> None:
        """Prefer others from now on, or no more.

        Args:
            within_s: part after so many seconds; the sooner of what was told counts. None = work may take its time.

        Raises:
            OrderRefused: it is to take work again, and its process is about to end.
        """
        if is_draining:
            self._duty.drain(is_draining=True, within_s=within_s)
            if within_s is not None:
                self._arm(within_s)
            return
        if self._duty.is_leaving:
            raise OrderRefused("this replica is being stopped and cannot take work again")
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._stay()
        self._duty.drain(is_draining=False)

    def leave(self, within_s: float) -> None:
        """Drain, part after so many seconds, and do not turn back."""
        self._duty.is_leaving = True
        self.drain(True, within_s)

    def _arm(self, within_s: float) -> None:
        loop = asyncio.get_running_loop()
        at_s = loop.time() + within_s
        if self._timer is not None:
            if self._at_s <= at_s:
                return
            self._timer.cancel()
        self._timer, self._at_s = loop.call_at(at_s, self._part), at_s
