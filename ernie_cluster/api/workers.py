"""Threads for CPU work, so that pictures are decoded and prompts tokenised off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from ernie_cluster.errors import Overloaded

T = TypeVar("T")


class Workers:
    """Owns the threads and the queue before them, which is bounded.

    Args:
        num_threads: that work at the same time.
        max_jobs: waiting or running; one more is refused.
    """

    def __init__(self, num_threads: int, max_jobs: int) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="preprocess")
        self._max_jobs = max_jobs
        self._jobs: set[Future[Any]] = set()

    async def run(self, work: Callable[[], T]) -> T:
        """Result of `work`, done in a thread. When the caller is cancelled, work that has not begun is dropped.

        Raises:
            Overloaded: the queue is full.
        """
        if len(self._jobs) >= self._max_jobs:
            raise Overloaded(f"{len(self._jobs)} requests are being prepared, the limit is {self._max_jobs}")
        job = self._pool.submit(work)
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)
        return await asyncio.wrap_future(job)

    def close(self) -> None:
        """Drop what waits; work that has begun ends in its own time."""
        self._pool.shutdown(wait=False, cancel_futures=True)
