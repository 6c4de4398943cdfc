"""What is kept for callers of a `DirectServer`, by the connection that asked for it: who is gone asks for nothing any more.

The end of a process ends its connections at once, long before any lease runs out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ernie_cluster.actors.direct import Method
from ernie_cluster.actors.messages import Ended


class Visits:
    """Names, each kept for the connection that used it last: one that was made anew takes over what an old one had.

    Args:
        abandoned: called with each name whose connection has ended.
    """

    def __init__(self, abandoned: Callable[[str], None]) -> None:
        self._abandoned = abandoned
        self._visitors: dict[str, object] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._visitors

    @contextmanager
    def visit(self) -> Iterator[Callable[[str], None]]:
        """While a connection lasts: keeps a name for it. What comes after its end is kept for nobody."""
        visitor, is_here = object(), True

        def keep(name: str) -> None:
            if is_here:
                self._visitors[name] = visitor

        try:
            yield keep
        finally:
            is_here = False
            for name in [name for name, whose in self._visitors.items() if whose is visitor]:
                del self._visitors[name]
                self._abandoned(name)

    def let_go(self, name: str) -> None:
        """Nothing is to be kept under this name; harmless when nothing was."""
        self._visitors.pop(name, None)


class Bookings:
    """The router's methods for one API process after another; what one has booked ends with its connection.

    Args:
        methods: those of the router.
        abandoned: lets go what is booked under a key, or waits to be; unknown ones are over already.
    """

    def __init__(self, methods: Mapping[str, Method], abandoned: Callable[[str], None]) -> None:
        self._methods, self._abandoned = methods, abandoned
        self._visits = Visits(abandoned)

    @contextmanager
    def visit(self) -> Iterator[Mapping[str, Method]]:
        """The methods for one connection, while it lasts."""
        with self._visits.visit() as keep:
            books = {name: self._booking(self._methods[name], keep) for name in ("acquire", "acquire_encoder")}
            yield {**self._methods, **books, "release": self._release}

    def _booking(self, method: Method, keep: Callable[[str], None]) -> Method:
        """Undone where the key was released, or its caller has gone, before it was booked."""

        async def book(key: str, *args: Any) -> Any:
            keep(key)
            try:
                return await method(key, *args)
            finally:
                if key not in self._visits:
                    self._abandoned(key)

        return book

    async def _release(self, model: str, attempts: Sequence[Ended]) -> None:
        for ended in attempts:
            self._visits.let_go(ended.key)
        await self._methods["release"](model, attempts)


class Pollers:
    """A replica's methods for one API process after another; who polled over a connection that has ended polls no more.

    Args:
        methods: those of the replica.
        abandoned: told of such a client.
    """

    def __init__(self, methods: Mapping[str, Method], abandoned: Callable[[str], None]) -> None:
        self._methods = methods
        self._visits = Visits(abandoned)

    @contextmanager
    def visit(self) -> Iterator[Mapping[str, Method]]:
        """The methods for one connection, while it lasts."""
        with self._visits.visit() as keep:

            async def poll(client_id: str, acknowledged: int) -> Any:
                keep(client_id)
                return await self._methods["poll"](client_id, acknowledged)

            yield {**self._methods, "poll": poll}
