"""Takes the calls that the server itself runs out of what a model says, and joins its rounds to one answer. Pure."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace

from ernie_cluster.api.markup import CallPiece, Pieces

BREAK = "\n\n"
"""Stands between two rounds of reasoning, or of content."""


class Sieve:
    """Of one choice.

    Args:
        own_names: of the functions that the server runs.
    """

    def __init__(self, own_names: Container[str]) -> None:
        self._own_names = own_names
        self._said = Pieces()
        self._content = _Joined()
        self._reasoning = _Joined()
        self._shown_calls: dict[int, int] = {}
        """Index of a client's call in its round -> among all that the client sees."""

    def push(self, pieces: Pieces) -> Pieces:
        """What the client sees of the next pieces of this round."""
        self._said.add(Pieces(pieces.content, pieces.reasoning, [replace(call) for call in pieces.calls]))
        return Pieces(
            self._content.push(pieces.content),
            self._reasoning.push(pieces.reasoning),
            [self._renumbered(call) for call in pieces.calls if not self._is_own(call)],
        )

    def end_round(self) -> tuple[Pieces, list[CallPiece]]:
        """All that the model said in this round, and those calls among it that are the server's to run."""
        said, self._said = self._said, Pieces()
        self._content.end_round()
        self._reasoning.end_round()
        return said, [call for call in said.calls if call.name in self._own_names]

    def _is_own(self, call: CallPiece) -> bool:
        return self._said.calls[call.index].name in self._own_names

    def _renumbered(self, call: CallPiece) -> CallPiece:
        index = self._shown_calls.setdefault(call.index, len(self._shown_calls))
        return replace(call, index=index, content_offset=self._content.offset(call.content_offset))


class _Joined:
    """The text of several rounds as one."""

    def __init__(self) -> None:
        self._num_before = 0
        self._num_chars = 0
        """Of this round."""

    def push(self, text: str) -> str:
        is_first = bool(text) and self._num_chars == 0
        self._num_chars += len(text)
        return BREAK + text if is_first and self._num_before else text

    def offset(self, num_chars: int) -> int:
        """Where the joined text is when this many characters of the round have come."""
        return self._num_before + self._break(num_chars) + num_chars

    def end_round(self) -> None:
        self._num_before += self._break(self._num_chars) + self._num_chars
        self._num_chars = 0

    def _break(self, num_chars: int) -> int:
        return len(BREAK) if self._num_before and num_chars else 0
