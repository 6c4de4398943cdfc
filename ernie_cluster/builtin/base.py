"""What a tool is that the server itself runs, in the middle of an answer. Standard library only.

Tools see pictures as references, so cropping one costs nothing here: pixels are touched where pictures are decoded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ernie_cluster.builtin.pictures import Gallery, Shown

Definition = Mapping[str, Any]
"""An OpenAI-shaped definition of a function."""


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What the model gets back: text, then pictures."""

    text: str = ""
    pictures: tuple[Shown, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    """For the client beside the text, JSON values."""

    @property
    def content(self) -> str | list[dict[str, Any]]:
        """Of the tool's message."""
        if not self.pictures:
            return self.text
        words = [{"type": "text", "text": self.text}] if self.text else []
        return words + [picture.part for picture in self.pictures]


@dataclass(frozen=True, slots=True)
class Search:
    """What a tool asks of the server in place of a result: the pictures of its index that look most like this one."""

    picture: Shown
    top_k: int
    """How many, at least 1; the operator may allow fewer."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """As of the result."""


def failed(why: str) -> ToolResult:
    """The result of a call that cannot be run, in words for the model and the client."""
    return ToolResult(f"Error: {why}", details={"error": why})


class BuiltinTool(Protocol):
    """One tool. Stateless, or safe to share between threads."""

    @property
    def name(self) -> str:
        """The function's, and the `type` by which a request asks for it."""
        ...

    @property
    def definition(self) -> Definition:
        """What the model is told of it."""
        ...

    def run(self, arguments: Mapping[str, Any], pictures: Gallery) -> ToolResult | Search:
        """Work for a worker thread, of milliseconds.

        Args:
            arguments: as the model wrote them; of any type.
            pictures: those of the conversation.

        Raises:
            ValueError: they cannot be used; the model is told why in these words.
        """
        ...


def function(name: str, description: str, properties: Mapping[str, Any], required: Sequence[str]) -> Definition:
    """An OpenAI-shaped definition."""
    parameters = {"type": "object", "properties": dict(properties), "required": list(required)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}
