"""The thread that steps an engine, sleeps while there is nothing to do, and sweeps what is late."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from ernie_cluster.engine.engine import Engine
from ernie_cluster.engine.fetching import Fetches
from ernie_cluster.engine.niceness import give_way
from ernie_cluster.errors import EngineFailed

log = logging.getLogger(__name__)

_BLOCKED_WAIT_S = 0.01
"""Pause of an engine that could run nothing, because somebody else holds the blocks that it needs."""


_VOTE_WAIT_S = 0.02
"""Idle engines of a gang with several leaders ask each other this often: so long may a first token wait for them."""


class EngineThread:
    """Owns the thread.

    Args:
        engine: nobody else steps it.
        fetches: whose deadlines are swept too, on time.
        lease_timeout_s: leases are swept several times in it.
        sweep: ends what is late.
        fail: told once, when the engine has stopped by itself.
    """

    def __init__(
        self,
        engine: Engine,
        fetches: Fetches,
        lease_timeout_s: float,
        sweep: Callable[[], None],
        fail: Callable[[EngineFailed], None],
    ) -> None:
        self._engine, self._fetches, self._sweep, self._fail = engine, fetches, sweep, fail
        self._idle_s = min(1.0, lease_timeout_s / 4)
        self.is_stopping = False
        self.step_since_s: float | None = None
        """When the running step began, on the engine's clock; None between two."""
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, *, is_hung: bool = False) -> None:
        """Return after the running step, if any; at once where it will not end."""
        with self._engine.lock:
            self.is_stopping = True
            self._engine.lock.notify_all()
        if self._thread.is_alive() and not is_hung:
            self._thread.join()

    def _loop(self) -> None:
        engine, idle_s = self._engine, self._idle_s
        give_way(engine.runner.device)
        try:
            next_sweep = engine.clock() + idle_s
            did_run, are_others_busy = True, False
            while True:
                with engine.lock:
                    if self.is_stopping:
                        break
                    next_sweep = min(next_sweep, self._fetches.next_deadline_s)
                    if not engine.has_work():
                        if not (are_others_busy or engine.runner.crew.has_notes):
                            wait_s = min(idle_s, max(0.0, next_sweep - engine.clock()))
                            engine.lock.wait(min(wait_s, _VOTE_WAIT_S) if engine.runner.crew.has_peers else wait_s)
                    elif not did_run:
                        engine.lock.wait(_BLOCKED_WAIT_S)
                if engine.clock() >= next_sweep:
                    self._sweep()
                    next_sweep = engine.clock() + idle_s
                self.step_since_s = engine.clock()
                did_run = engine.step()
                are_others_busy = not did_run and engine.runner.rest()
                self.step_since_s = None
            engine.runner.crew.dismiss()
        except Exception as e:
            if self.is_stopping:
                return  # the gang is stopping too, and some of its ranks were faster
            log.exception("the engine stopped")
            self._fail(EngineFailed(f"the engine stopped: {type(e).__name__}: {e}"))
