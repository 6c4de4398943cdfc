"""One hostile request, and what must become of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ernie_cluster.api.limits import ApiLimits
from tests.unit.api.client import CHAT_URL, COMPLETION_URL, chat_body

LIMITS = ApiLimits(
    max_body_bytes=60_000,
    max_json_items=2000,
    max_messages=4,
    max_prompts=3,
    max_tools=2,
    max_n=3,
    max_grammar_bytes=5000,
)

Case = tuple[Any, int, str | None]
"""Fields that differ from a good body, status, field that the error names."""


@dataclass(frozen=True)
class Row:
    """A request, and its answer. With status 200 it is odd, and served nevertheless."""

    name: str
    body: Any
    """JSON, or the bytes themselves."""
    status: int = 400
    param: str | None = None
    path: str = CHAT_URL
    method: str = "POST"
    headers: Mapping[str, str] = field(default_factory=dict)


def rows(what: str, cases: Iterable[Case], path: str, good: Mapping[str, Any]) -> list[Row]:
    """Good bodies with other fields."""
    return [
        Row(f"{what} {i} {param or status}", {**good, **fields}, status, param, path)
        for i, (fields, status, param) in enumerate(cases)
    ]


def chat_rows(what: str, cases: Iterable[Case], model: str = "tiny") -> list[Row]:
    return rows(what, cases, CHAT_URL, chat_body(model=model))


def completion_rows(what: str, cases: Iterable[Case], model: str = "tiny") -> list[Row]:
    return rows(what, cases, COMPLETION_URL, {"model": model, "prompt": "p"})


def content(value: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": value}]}


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": function}


def schema_format(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}}


def answered(call_id: str | None) -> dict[str, Any]:
    """A conversation in which a tool answers `call_id`, where `call_1` was asked."""
    call = {"id": "call_1", **tool(name="f", arguments="{}")}
    return {
        "messages": [
            {"role": "user", "content": "x"},
            {"role": "assistant", "tool_calls": [call, tool(name="f", arguments="{}")]},
            {"role": "tool", "content": "y", "tool_call_id": call_id},
        ]
    }
