"""A dialect is one way to ask for an answer and to be given it: a route's request body, response and events.

A new one is an object with `read`. What it reads becomes a chat or text completion of ours, and from there on all
dialects share one road; on the way out, a `Presentation` puts the answer into the dialect's words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from ernie_cluster.api.answer import Answer, Delta
from ernie_cluster.api.media import Fetched
from ernie_cluster.api.prepare import Job
from ernie_cluster.api.schemas import GenerationBody
from ernie_cluster.request import Span

R = TypeVar("R", contravariant=True)


@dataclass(frozen=True, slots=True)
class Heading:
    """What every object of one answer repeats."""

    response_id: str
    created: int
    """Seconds since the epoch."""
    model: str


class Presentation(Protocol):
    """Shows one answer: `whole`, or `news` as often as there are any, and at last `closing` or `failure`."""

    def whole(self, answer: Answer, choices: Sequence[Delta]) -> Any:
        """The finished answer in one piece.

        Args:
            answer: its counts and spans.
            choices: each choice's deltas, added up.
        """
        ...

    def news(self, deltas: Sequence[Delta]) -> list[bytes]:
        """Events that tell what is new; none when there is nothing to show."""
        ...

    def closing(self, answer: Answer) -> list[bytes]:
        """Events that end a finished answer."""
        ...

    def failure(self, exc: Exception) -> list[bytes]:
        """Events that end an answer which cannot be finished; none where the wire itself tells it."""
        ...


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, understood."""

    body: GenerationBody
    present: Callable[[Heading, Job, Sequence[Span]], Presentation]
    """Given the stages, too, that the API itself went through."""
    origins: Mapping[str, str] = field(default_factory=dict)
    """Of the body's fields, where it is a translation; see `translate.py`."""
    content: Fetched = field(default_factory=dict)
    """Pictures and videos that came as bytes, by the data URLs that stand for them in the body."""


class Dialect(Protocol[R]):
    """One generation route, whose requests come as an R."""

    @property
    def id_prefix(self) -> str:
        """Of an answer's id."""
        ...

    def read(self, raw: R) -> Asked:
        """Check and translate a request's body. CPU work.

        Raises:
            InvalidRequest: names the field, in the dialect's own spelling.
        """
        ...
