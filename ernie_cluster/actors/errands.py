"""Pictures of one attempt on their way through a vision replica, or two: whoever is ready first counts.

Embeddings are functions of the picture, and the prefill replica takes them from whoever brings them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

from ernie_cluster.actors.links import Link, failure_of
from ernie_cluster.actors.merge import Failure
from ernie_cluster.actors.messages import EncodeReport, EncodeTask
from ernie_cluster.errors import ErnieClusterError

log = logging.getLogger(__name__)


class Errand:
    """Some pictures of one attempt.

    Args:
        task: what is to be encoded, and for whom.
        link: to the vision replica that was chosen.
        later: runs what need not be waited for.
    """

    def __init__(self, task: EncodeTask, link: Link, later: Callable[[Coroutine[Any, Any, None]], None]) -> None:
        self._task, self._link, self._later = task, link, later
        self.failures: list[Failure] = []
        """Of those that were asked."""
        self.is_hedged = False
        """Another one was looked for."""

    async def run(
        self, hedge_s: float | None, another: Callable[[], Awaitable[Link]]
    ) -> tuple[str, EncodeReport] | None:
        """Who did it, and its report; None when nobody could.

        Args:
            hedge_s: another one is asked when there is nothing after this time, or the first has failed; None = never.
            another: finds and books it; raises an error of our tree where there is none.
        """
        first = asyncio.ensure_future(self._ask(self._link))
        tries = {first}
        try:
            await asyncio.wait(tries, timeout=hedge_s)
            if hedge_s is not None and not (first.done() and first.result()):
                tries.add(asyncio.ensure_future(self._ask_another(another)))
            pending = tries
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for answer in (task.result() for task in done):
                    if answer is not None:
                        return answer
            return None
        finally:
            for task in tries:
                task.cancel()

    async def _ask_another(self, another: Callable[[], Awaitable[Link]]) -> tuple[str, EncodeReport] | None:
        self.is_hedged = True
        try:
            link = await another()
        except ErnieClusterError as e:
            log.info("%s: nobody else encodes: %s", self._task.request_id, e)
            return None
        log.warning(
            "%s: %s is asked, too, for %s", self._task.request_id, link.info.replica_id, self._link.info.replica_id
        )
        return await self._ask(link)

    async def _ask(self, link: Link) -> tuple[str, EncodeReport] | None:
        """One replica; None when it fails."""
        async with _watched(link, self._task.request_id):
            try:
                return link.info.replica_id, await link.work("encode", self._task)
            except asyncio.CancelledError:  # the other one was faster, or nobody waits any more
                self._later(_abort(link, self._task.request_id))
                raise
            except Exception as e:
                self.failures.append(failure_of(e, link.info.replica_id))
                return None


@contextlib.asynccontextmanager
async def _watched(link: Link, key: str) -> AsyncIterator[None]:
    """Have the replica show that it lives; its news are the results of calls."""
    link.subscribe(key, None)
    try:
        yield
    finally:
        link.unsubscribe(key)


async def _abort(link: Link, key: str) -> None:
    await link.call("abort", [key])
