"""What an engine rank does for its requests each second: leases live on while somebody polls, and end with who does not."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from ernie_cluster.actors.events import EventHub
from ernie_cluster.actors.strays import Strays

log = logging.getLogger(__name__)

SWEEP_S = 1.0


class Requests(Protocol):
    """What it needs of a `Worker`; see there."""

    def abort(self, request_id: str) -> bool: ...

    def renew(self, request_ids: Iterable[str]) -> None: ...

    def gone(self, request_ids: Iterable[str]) -> list[str]: ...


class Upkeep:
    """Requests whose client polls keep their leases; those of a silent one are ended, those that have left are closed.

    Args:
        hub: knows whose requests there are.
        worker: has them.
        opening: prompts that the worker does not know yet.
    """

    def __init__(self, hub: EventHub, worker: Requests, opening: Collection[str]) -> None:
        self._hub, self._worker, self._opening = hub, worker, opening
        self._strays = Strays()
        self._orphans: set[str] = set()
        """Their client is gone, and they are to be ended."""

    async def run(self) -> None:
        """For ever; what fails is tried again."""
        while True:
            await asyncio.sleep(SWEEP_S)
            self._orphans.update(self._hub.drop_silent())
            for request_id in tuple(self._orphans):
                with _logged():
                    self._worker.abort(request_id)
                    self._orphans.discard(request_id)
            with _logged():
                self._worker.renew(self._hub.live_requests())
            with _logged():
                gone = self._worker.gone(self._hub.live_requests())
                for request_id in self._strays.over((r for r in gone if r not in self._opening), time.monotonic()):
                    self._hub.close(request_id)


@contextmanager
def _logged() -> Iterator[None]:
    try:
        yield
    except Exception:
        log.exception("the upkeep of requests failed, and is tried again")
