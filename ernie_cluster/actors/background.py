"""Work that does not belong to the request in whose course it is started.

When a client leaves, Serve cancels its request's Ray task, and with it all calls that were made in that task's
context: also the poll that serves everybody, and the very calls that give things back. A task with an empty context is
nobody's child.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, TypeVar

T = TypeVar("T")


def start(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Run `work` on the running loop; the caller keeps the task, else it may be collected."""
    return asyncio.get_running_loop().create_task(work, context=Context())


def call(function: Callable[..., T], *args: Any) -> T:
    """`function(*args)` at once, for a function that itself starts something in Ray."""
    return Context().run(function, *args)
