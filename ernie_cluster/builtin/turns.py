"""The two kinds of messages by which calls and their results stand in a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Called:
    """A call that an assistant made."""

    call_id: str
    name: str
    arguments: str
    """JSON text."""


def turn_of(
    calls: Sequence[Called], contents: Sequence[str | list[dict[str, Any]]], *, text: str = "", reasoning: str = ""
) -> list[dict[str, Any]]:
    """The assistant's message, and one per result; OpenAI-shaped.

    Args:
        calls: what was called, at least one.
        contents: what came of each.
        text: what the assistant said beside.
        reasoning: what it thought before.
    """
    assistant: dict[str, Any] = {"role": "assistant", "content": text, "tool_calls": [_wire(call) for call in calls]}
    if reasoning:
        assistant["reasoning_content"] = reasoning
    results = zip(calls, contents, strict=True)
    return [assistant, *({"role": "tool", "tool_call_id": c.call_id, "content": content} for c, content in results)]


def _wire(call: Called) -> dict[str, Any]:
    return {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
