"""A choice as a row of rounds, and who decides whether there is another one; `answer.py` builds on this."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ernie_cluster.request import GenerationRequest, Span

if TYPE_CHECKING:
    from ernie_cluster.api.answer import ChoiceText, Delta


@dataclass(slots=True)
class Choice:
    """One choice: its rounds in order. Only the last may be under way; all others ended with calls of our own tools."""

    index: int
    rounds: list[ChoiceText]

    @property
    def last(self) -> ChoiceText:
        return self.rounds[-1]

    @property
    def num_tokens(self) -> int:
        return sum(text.num_tokens for text in self.rounds)

    @property
    def num_reasoning_tokens(self) -> int:
        return sum(text.num_reasoning_tokens for text in self.rounds)

    @property
    def spans(self) -> list[Span]:
        return [span for text in self.rounds for span in text.spans]

    @property
    def stop_string(self) -> str | None:
        """The one that ended it."""
        return self.last.parser.stop_string


class Step(NamedTuple):
    """How a choice goes on after a round."""

    delta: Delta
    request: GenerationRequest | None
    """Of the next round; None where there is none."""


class Turns(Protocol):
    """What becomes of one choice, round by round."""

    def shown(self, delta: Delta) -> Delta:
        """What the client is to see of it."""
        ...

    async def follow(self, text: ChoiceText) -> Step | None:
        """After a round; None when all is said. Raises ErnieClusterError."""
        ...


class Rounds(Protocol):
    """Whether answers have several rounds; `rounds.py` has those that do."""

    def begin(self, text: ChoiceText) -> Turns:
        """Of a choice that begins with this round."""
        ...


class SingleRound:
    """An answer without tools of our own."""

    def begin(self, text: ChoiceText) -> Turns:
        return self

    def shown(self, delta: Delta) -> Delta:
        return delta

    async def follow(self, text: ChoiceText) -> Step | None:
        return None


SINGLE_ROUND = SingleRound()
