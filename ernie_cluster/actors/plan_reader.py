"""The router's plan in the process of Serve's controller: a thread exchanges what Serve knows for it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import ray

from ernie_cluster.actors.messages import NAMESPACE
from ernie_cluster.policy.scaling.plan import Plan, PoolKey

log = logging.getLogger(__name__)

_INTERVAL_S = 0.25
_TIMEOUT_S = 5.0
_MAX_AGE_S = 10.0
"""A plan that was not confirmed for longer is followed no more; a reader whom no policy asks for longer ends."""

State = dict[PoolKey, tuple[int, tuple[str, ...]]]
Exchange = Callable[[State, Plan | None], Plan | None]


class Reader:
    """Keeps one application's plan fresh.

    Args:
        exchange: gives the plan for what Serve knows and the plan that was got last; may wait, may raise.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._state: State = {}
        self._plan: Plan | None = None
        self._at_s = 0.0
        self._put_s = time.monotonic()

    def start(self) -> None:
        """Exchange as long as policies ask, on a thread of its own."""
        self._thread = threading.Thread(target=self._run, name="ernie-plan", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether it goes on."""
        return self._thread is not None and self._thread.is_alive()

    def put(self, pool: PoolKey, target: int, running: tuple[str, ...]) -> None:
        """What Serve knows of a pool."""
        with self._lock:
            self._state[pool] = (target, running)
            self._put_s = time.monotonic()

    def get(self, now_s: float) -> Plan | None:
        """The plan, None while there is no fresh one."""
        with self._lock:
            return self._plan if now_s - self._at_s <= _MAX_AGE_S else None

    def read(self) -> None:
        """One exchange."""
        with self._lock:
            state, kept = dict(self._state), self._plan
        plan = self._exchange(state, kept)
        with self._lock:
            if plan is not None:
                self._plan, self._at_s = plan, time.monotonic()

    def _run(self) -> None:
        while time.monotonic() - self._put_s < _MAX_AGE_S:
            time.sleep(_INTERVAL_S)
            try:
                self.read()
            except Exception as e:  # it is being started again
                log.debug("no plan: %s", e)


_readers: dict[tuple[str, str], Reader] = {}
"""By router and life. Of this process: Serve makes a policy anew whenever it likes."""


def reader_of(router: str, life: str) -> Reader:
    """The one of an application in this process; all its policies are called by one thread."""
    reader = _readers.get((router, life))
    if reader is None or not reader.is_alive:
        reader = _readers[router, life] = Reader(lambda state, kept: _ask(router, state, kept))
        reader.start()
    return reader


def _ask(router: str, state: State, kept: Plan | None) -> Plan | None:
    actor = ray.get_actor(router, NAMESPACE)
    plan: Plan | None = ray.get(actor.exchange.remote(state, kept), timeout=_TIMEOUT_S)
    return plan
