"""Threads for CPU work, so that pictures are decoded and prompts tokenised off the event loop.

Work with pictures has threads of its own: each of its requests takes one until its last picture is decoded, and texts must
not wait for that. They are many, for they mostly wait for the processes that decode, which take a few of each in turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from ernie_cluster.errors import Overloaded

T = TypeVar("T")


class Workers:
    """Owns the threads and the queues before them, which are bounded.

    Args:
        num_threads: that work at the same time.
        max_jobs: waiting or running, of both kinds; one more is refused.
        num_media_threads: that work with pictures at the same time.
    """

    def __init__(self, num_threads: int, max_jobs: int, num_media_threads: int = 1) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="preprocess")
        self._media_pool = ThreadPoolExecutor(num_media_threads, thread_name_prefix="media")
        self._max_jobs = max_jobs
        self._jobs: set[Future[Any]] = set()

    async def run(self, work: Callable[[], T], *, has_media: bool = False) -> T:
        """Result of `work`, done in a thread. When the caller is cancelled, work that has not begun is dropped.

        Args:
            has_media: pictures or videos are a part of it.

        Raises:
            Overloaded: the queue is full.
        """
        if len(self._jobs) >= self._max_jobs:
            raise Overloaded(f"{len(self._jobs)} requests are being prepared, the limit is {self._max_jobs}")
        job = (self._media_pool if has_media else self._pool).submit(work)
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)
        return await asyncio.wrap_future(job)

    def close(self) -> None:
        """Drop what waits; work that has begun ends in its own time."""
        for pool in (self._pool, self._media_pool):
            pool.shutdown(wait=False, cancel_futures=True)
