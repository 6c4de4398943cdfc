"""OpenAI's Responses API: the answer as a list of items, and events that tell of each item when it begins, grows, ends.

Nothing is stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ernie_cluster.api.answer import Answer, Delta
from ernie_cluster.api.blocks import Block, BlockKind, Row, Step
from ernie_cluster.api.dialect import Asked, Heading
from ernie_cluster.api.openai import sse
from ernie_cluster.api.prepare import Job
from ernie_cluster.api.responses_body import ResponsesBody, read_responses
from ernie_cluster.api.status import error_body, status_of
from ernie_cluster.request import FinishReason, Span

ID_PREFIX = "resp_"
_ITEM_PREFIXES: dict[BlockKind, str] = {"reasoning": "rs", "text": "msg", "call": "fc"}


class Responses:
    """`/v1/responses`."""

    id_prefix = ID_PREFIX
    body_type = ResponsesBody

    def read(self, raw: dict[str, Any]) -> Asked:
        body, chat, origins = read_responses(raw)
        return Asked(chat, partial(ResponsesPresentation, echo_of(body, raw)), origins)


_DEFAULTS: Mapping[str, Mapping[str, Any]] = {"function": {"parameters": None, "strict": None}}
"""Of a tool's fields, by its type."""


def echo_of(body: ResponsesBody, raw: Mapping[str, Any]) -> dict[str, Any]:
    """What a response repeats of its request, with the values that took the place of absent ones."""
    return {
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": {"type": "text"}} | (raw.get("text") or {}),
        "tool_choice": raw.get("tool_choice") or "auto",
        "tools": [_DEFAULTS.get(tool["type"], {}) | tool for tool in raw.get("tools") or ()],
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


class ResponsesPresentation:
    """Shows one answer; there is only one choice."""

    def __init__(self, echo: Mapping[str, Any], heading: Heading, job: Job, own_spans: Sequence[Span]) -> None:
        self._echo = echo
        self._heading = heading
        self._job = job
        self._row = Row()
        self._num_events = 0
        self._finish_reason: str | None = None

    def whole(self, answer: Answer, choices: Sequence[Delta]) -> dict[str, Any]:
        self._row.push(choices[0].pieces)
        self._row.end()
        self._finish_reason = choices[0].finish_reason
        return self._response(self._end_status, self._usage(answer))

    def news(self, deltas: Sequence[Delta]) -> list[bytes]:
        events = [] if self._num_events else self._opening()
        for delta in deltas:
            events += self._tell(self._row.push(delta.pieces))
            self._finish_reason = delta.finish_reason
        return events

    def closing(self, answer: Answer) -> list[bytes]:
        events = self._tell(self._row.end())
        response = self._response(self._end_status, self._usage(answer))
        return [*events, self._event(f"response.{self._end_status}", response=response)]

    def failure(self, exc: Exception) -> list[bytes]:
        error = error_body(exc)["error"]
        code = "rate_limit_exceeded" if status_of(exc).http == 429 else "server_error"
        response = self._response("failed", None) | {"error": {"code": code, "message": error["message"]}}
        return [
            self._event("error", code=code, message=error["message"], param=error["param"]),
            self._event("response.failed", response=response),
        ]

    # Events

    def _opening(self) -> list[bytes]:
        response = self._response("in_progress", None)
        return [self._event(name, response=response) for name in ("response.created", "response.in_progress")]

    def _event(self, name: str, **fields: Any) -> bytes:
        event = sse({"type": name, "sequence_number": self._num_events, **fields}, name)
        self._num_events += 1
        return event

    def _tell(self, steps: Sequence[Step]) -> list[bytes]:
        tell = {"begin": self._begin, "grow": self._grow, "end": self._end}
        return [event for step in steps for event in tell[step.kind](step)]

    def _begin(self, step: Step) -> list[bytes]:
        block = self._row.blocks[step.index]
        empty = Block(block.kind, block.name)
        item = self._item(step.index, empty, "in_progress")
        hollow = item if block.kind == "call" else item | {"content": []}
        events = [self._event("response.output_item.added", output_index=step.index, item=hollow)]
        if block.kind != "call":
            events.append(self._part_event("response.content_part.added", step.index, part=_part(empty)))
        return events

    def _grow(self, step: Step) -> list[bytes]:
        kind = self._row.blocks[step.index].kind
        if kind == "call":
            return [self._item_event("response.function_call_arguments.delta", step.index, delta=step.text)]
        if kind == "reasoning":
            return [self._part_event("response.reasoning_text.delta", step.index, delta=step.text)]
        return [self._part_event("response.output_text.delta", step.index, delta=step.text, logprobs=[])]

    def _end(self, step: Step) -> list[bytes]:
        index, block = step.index, self._row.blocks[step.index]
        if block.kind == "call":
            done = "response.function_call_arguments.done"
            events = [self._item_event(done, index, arguments=block.text)]
        else:
            events = [
                self._part_event("response.reasoning_text.done", index, text=block.text)
                if block.kind == "reasoning"
                else self._part_event("response.output_text.done", index, text=block.text, logprobs=[]),
                self._part_event("response.content_part.done", index, part=_part(block)),
            ]
        item = self._item(index, block, self._status_of(index))
        return [*events, self._event("response.output_item.done", output_index=index, item=item)]

    def _item_event(self, name: str, index: int, **fields: Any) -> bytes:
        return self._event(name, item_id=self._item_id(index), output_index=index, **fields)

    def _part_event(self, name: str, index: int, **fields: Any) -> bytes:
        """Of an item's only part."""
        return self._item_event(name, index, content_index=0, **fields)

    # Objects

    @property
    def _is_cut(self) -> bool:
        return self._finish_reason == FinishReason.LENGTH

    @property
    def _end_status(self) -> str:
        return "incomplete" if self._is_cut else "completed"

    def _status_of(self, index: int) -> str:
        """What has become of an item; whatever cut an answer short cut its last item."""
        is_last = index == len(self._row.blocks) - 1
        return "incomplete" if is_last and (self._row.is_open or self._is_cut) else "completed"

    def _response(self, status: str, usage: dict[str, Any] | None) -> dict[str, Any]:
        is_running = status == "in_progress"
        items = [] if is_running else [self._item(i, b, self._status_of(i)) for i, b in enumerate(self._row.blocks)]
        return {
            "id": self._heading.response_id,
            "object": "response",
            "created_at": self._heading.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self._heading.model,
            "output": items,
            "usage": usage,
            **self._echo,
        }

    def _item_id(self, index: int) -> str:
        return f"{_ITEM_PREFIXES[self._row.blocks[index].kind]}_{self._suffix(index)}"

    def _suffix(self, index: int) -> str:
        return f"{self._heading.response_id.removeprefix(ID_PREFIX)}_{index}"

    def _item(self, index: int, block: Block, status: str) -> dict[str, Any]:
        head = {"id": self._item_id(index), "status": status}
        if block.kind == "call":
            call_id = f"call_{self._suffix(index)}"
            called = {"call_id": call_id, "name": block.name, "arguments": block.text}
            return {"type": "function_call", **head, **called}
        if block.kind == "reasoning":
            return {"type": "reasoning", **head, "summary": [], "content": [_part(block)], "encrypted_content": None}
        return {"type": "message", **head, "role": "assistant", "content": [_part(block)]}

    def _usage(self, answer: Answer) -> dict[str, Any]:
        num_prompt_tokens, num_tokens = answer.num_prompt_tokens, answer.num_tokens
        return {
            "input_tokens": num_prompt_tokens,
            "input_tokens_details": {"cached_tokens": answer.num_cached_tokens, "cache_write_tokens": 0},
            "output_tokens": num_tokens,
            "output_tokens_details": {"reasoning_tokens": answer.num_reasoning_tokens},
            "total_tokens": num_prompt_tokens + num_tokens,
        }


def _part(block: Block) -> dict[str, Any]:
    """The only part of a thought or a message."""
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": block.text}
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": []}


RESPONSES = Responses()
