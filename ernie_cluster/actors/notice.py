"""SIGTERM as notice to quit: a machine that is taken away says so a while before, and what runs here can go elsewhere.

Ray's handler, which only its main thread could replace and none of ours is that, ends a worker at once by raising SystemExit
through one function. Here that function is put off until the work that a notice begins is done; then the signal is sent
again, and takes the way that it always had. Should another Ray end its workers otherwise, they end as they always did.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Coroutine
from typing import Any

from ray._private import worker

from ernie_cluster.actors import background

log = logging.getLogger(__name__)

_RAISE = "raise_sys_exit_with_custom_error_message"
_END_S = 2.0
"""What Ray's own end of the process may take."""


class Notice:
    """What this process does before SIGTERM ends it. There is one; made on the event loop that `work` is done on.

    Args:
        work: moves elsewhere what runs here; has its own deadline.
        end: sends the signal again.
    """

    def __init__(
        self,
        work: Callable[[], Coroutine[Any, Any, None]],
        end: Callable[[], None] = lambda: os.kill(os.getpid(), signal.SIGTERM),
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._work, self._end = work, end
        self._is_over = False
        self._task: asyncio.Task[None] | None = None
        self._raise: Callable[..., None] | None = getattr(worker, _RAISE, None)
        if self._raise is not None:
            setattr(worker, _RAISE, self._put_off)

    def _put_off(self, *args: Any, **kwargs: Any) -> None:
        """In the place of Ray's function, on its main thread."""
        if self._is_over:
            assert self._raise is not None
            self._raise(*args, **kwargs)
        else:
            self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        if self._task is None:
            log.warning("told to end: what runs here goes elsewhere")
            self._task = background.start(self._finish())

    async def _finish(self) -> None:
        try:
            await self._work()
        except Exception as e:
            log.warning("told to end, and not all is elsewhere: %s", e or type(e).__name__)
        self._is_over = True
        self._end()
        await asyncio.sleep(_END_S)
        os._exit(1)
