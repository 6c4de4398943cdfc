"""The one thread that encodes: whose turn it is, who only waits for what another has asked for, and whether it still moves.

Pictures of all requests are encoded in turn and videos in pieces, so that none waits for a whole video of another's; those
that are cached need not wait at all.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakValueDictionary

from ernie_cluster.errors import EngineFailed

if TYPE_CHECKING:  # torch, which the conductor need not import
    import numpy as np
    from numpy.typing import NDArray

    from ernie_cluster.actors.encoder import Encoder
    from ernie_cluster.request import MediaInput

_Result = TypeVar("_Result")


class EncoderThread:
    """Owns the thread; all methods are for one event loop.

    Args:
        encoder: does the work; in this thread alone, but for `known`.
        timeout_s: a piece that takes longer hangs, as `EngineConfig.step_timeout_s` says.
        before: called in the thread before each piece with the request's id, after what may have been a long wait; raises
            where it need not be encoded any more.
        begin: called in the thread once.
        clock: of `timeout_s`.
    """

    def __init__(
        self,
        encoder: Encoder,
        timeout_s: float,
        before: Callable[[str], None],
        begin: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._encoder, self._timeout_s, self._before, self._clock = encoder, timeout_s, before, clock
        self._thread = ThreadPoolExecutor(1, "encoder", initializer=begin)
        self._twins: WeakValueDictionary[bytes, asyncio.Lock] = WeakValueDictionary()
        """By content hash: held by whoever encodes it."""
        self._since_s: float | None = None
        """When the piece began that is being encoded."""
        self._failure: EngineFailed | None = None
        self._waiting: set[asyncio.Future[None]] = set()
        """Of those that wait for the thread: to be ended when it hangs."""

    async def rows(self, request_id: str, media: MediaInput) -> tuple[NDArray[np.uint8], bool]:
        """Embeddings as of `Encoder.embed`, and whether they came from the cache. Who wants what is being encoded already
        waits for that.

        Raises:
            EngineFailed: the thread hangs; and whatever `before` raises.
        """
        known = self._encoder.known(media)
        if known is not None:
            return known, True
        async with self._twins.setdefault(media.media_hash, asyncio.Lock()):
            known = self._encoder.known(media)
            if known is not None:
                return known, True
            steps, rows = self._encoder.steps(media), None
            while rows is None:
                rows = await self._run(lambda: self._step(request_id, steps))
            return rows, False

    async def pool(self, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See `Encoder.pool`.

        Raises:
            EngineFailed: the thread hangs, or as of `Encoder.pool`.
        """
        return await self._run(lambda: self._encoder.pool(rows))

    def look_after(self) -> None:
        """To be called now and then: nobody else notices a piece that does not end, as where a driver is stuck.

        Raises:
            EngineFailed: it hangs; whoever waits for it has been told.
        """
        since_s = self._since_s
        piece_s = 0.0 if since_s is None else self._clock() - since_s
        if self._failure is None and piece_s > self._timeout_s:
            self._failure = EngineFailed(
                f"a picture has been encoded for {piece_s:.0f} s, longer than engine.step_timeout_s; the encoder hangs"
            )
            for waiting in self._waiting:
                waiting.set_result(None)
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """End the thread after the piece that is being encoded; one that hangs is left behind."""
        self._thread.shutdown(wait=self._failure is None, cancel_futures=True)

    async def _run(self, work: Callable[[], _Result]) -> _Result:
        self.look_after()
        loop = asyncio.get_running_loop()
        done, hangs = loop.run_in_executor(self._thread, self._timed, work), loop.create_future()
        self._waiting.add(hangs)
        try:
            await asyncio.wait({done, hangs}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._waiting.discard(hangs)
            if not done.done():
                done.cancel()
        if done.cancelled():
            self.look_after()
        return await done

    def _timed(self, work: Callable[[], _Result]) -> _Result:
        """In the thread."""
        self._since_s = self._clock()
        try:
            return work()
        finally:
            self._since_s = None

    def _step(self, request_id: str, steps: Iterator[NDArray[np.uint8] | None]) -> NDArray[np.uint8] | None:
        self._before(request_id)
        return next(steps)
