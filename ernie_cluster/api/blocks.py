"""An answer as a row of blocks, in the order in which the model wrote them: a thought, text, a call, text, a call.

Some APIs show an answer so, and tell of each block when it begins, grows and ends. Pure; the blocks do not depend on
how the answer was cut into pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ernie_cluster.api.markup import Pieces

BlockKind = Literal["reasoning", "text", "call"]


@dataclass(slots=True)
class Block:
    """One block, as far as it has come."""

    kind: BlockKind
    name: str = ""
    """Of the called function."""
    text: str = ""
    """A call's is its arguments."""


@dataclass(frozen=True, slots=True)
class Step:
    """What happens to one block; blocks do not overlap."""

    kind: Literal["begin", "grow", "end"]
    index: int
    """Of the block in its row."""
    text: str = ""
    """By which it grows."""


class Row:
    """The blocks of one answer."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._num_content = 0
        """Characters of content so far."""
        self.is_open = False
        """The last block may still grow."""

    def push(self, pieces: Pieces) -> list[Step]:
        """Take what comes next; returns what it does to the blocks."""
        steps = self._grow("reasoning", pieces.reasoning) if pieces.reasoning else []
        content = pieces.content
        for call in pieces.calls:
            if call.name is not None:
                num_before = call.content_offset - self._num_content
                steps += self._content(content[:num_before]) + self.end()
                content = content[num_before:]
                steps.append(self._begin(Block("call", call.name)))
            if call.arguments:
                steps += self._grow("call", call.arguments)
        return steps + self._content(content)

    def end(self) -> list[Step]:
        """End the last block, if it has not ended."""
        if not self.is_open:
            return []
        self.is_open = False
        return [Step("end", len(self.blocks) - 1)]

    def _content(self, text: str) -> list[Step]:
        self._num_content += len(text)
        return self._grow("text", text) if text else []

    def _grow(self, kind: BlockKind, text: str) -> list[Step]:
        steps = []
        if not self.is_open or self.blocks[-1].kind != kind:
            steps = [*self.end(), self._begin(Block(kind))]
        self.blocks[-1].text += text
        return [*steps, Step("grow", len(self.blocks) - 1, text)]

    def _begin(self, block: Block) -> Step:
        self.blocks.append(block)
        self.is_open = True
        return Step("begin", len(self.blocks) - 1)
