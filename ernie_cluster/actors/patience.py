"""Waiting for another process that may have stopped: how long it was silent, and not how long we were."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_LOOKS = 8
"""Parts that a time to wait is cut into."""


async def answered(work: Coroutine[Any, Any, T], timeout_s: float) -> T:
    """What `work` returns or raises, if that comes within `timeout_s`; else it is cancelled.

    A pause of this process counts for one part of the time at most: what has come meanwhile is read before anybody is
    taken for lost.

    Raises:
        TimeoutError: it did not come.
    """
    task = asyncio.ensure_future(work)
    try:
        for _ in range(_LOOKS):
            if (await asyncio.wait({task}, timeout=timeout_s / _LOOKS))[0]:
                return task.result()
    finally:
        task.cancel()
    raise TimeoutError
