"""Anthropic's Messages API: the answer as a list of blocks, and events that tell of each when it begins, grows, ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic_core import from_json

from ernie_cluster.api.answer import TOOL_CALLS, Answer, Delta
from ernie_cluster.api.anthropic_body import MessagesBody, read_messages
from ernie_cluster.api.blocks import Block, Row, Step
from ernie_cluster.api.dialect import Asked, Heading
from ernie_cluster.api.openai import sse
from ernie_cluster.api.prepare import Job
from ernie_cluster.api.status import anthropic_error
from ernie_cluster.request import FinishReason, Span

ID_PREFIX = "msg_"

_STOP_REASONS = {FinishReason.STOP: "end_turn", FinishReason.LENGTH: "max_tokens", TOOL_CALLS: "tool_use"}


class Messages:
    """`/v1/messages`."""

    id_prefix = ID_PREFIX
    body_type = MessagesBody

    def read(self, raw: dict[str, Any]) -> Asked:
        body, origins = read_messages(raw)
        return Asked(body, MessagesPresentation, origins)


class MessagesPresentation:
    """Shows one answer; there is only one choice."""

    def __init__(self, heading: Heading, job: Job, own_spans: Sequence[Span]) -> None:
        self._heading = heading
        self._num_prompt_tokens = job.num_prompt_tokens
        self._row = Row()
        self._is_begun = False
        self._finish_reason: str | None = None

    def whole(self, answer: Answer, choices: Sequence[Delta]) -> dict[str, Any]:
        self._row.push(choices[0].pieces)
        self._finish_reason = choices[0].finish_reason
        blocks = [self._block(i, block) for i, block in enumerate(self._row.blocks)]
        return self._message(blocks, self._usage(answer)) | self._end(answer)

    def news(self, deltas: Sequence[Delta]) -> list[bytes]:
        events = [] if self._is_begun else [self._opening()]
        self._is_begun = True
        for delta in deltas:
            events += [self._tell(step) for step in self._row.push(delta.pieces)]
            self._finish_reason = delta.finish_reason
        return events

    def closing(self, answer: Answer) -> list[bytes]:
        return [
            *(self._tell(step) for step in self._row.end()),
            _event("message_delta", delta=self._end(answer), usage=self._usage(answer)),
            _event("message_stop"),
        ]

    def failure(self, exc: Exception) -> list[bytes]:
        return [sse(anthropic_error(exc), "error")]

    # Events

    def _opening(self) -> bytes:
        usage = {"input_tokens": self._num_prompt_tokens, "output_tokens": 0}
        message = self._message([], usage) | _ending(None)
        return _event("message_start", message=message)

    def _tell(self, step: Step) -> bytes:
        block = self._row.blocks[step.index]
        if step.kind == "begin":
            empty = self._block(step.index, Block(block.kind, block.name))
            return _event("content_block_start", index=step.index, content_block=empty)
        if step.kind == "end":
            return _event("content_block_stop", index=step.index)
        return _event("content_block_delta", index=step.index, delta=_delta(block, step.text))

    # Objects

    def _message(self, blocks: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": self._heading.response_id,
            "type": "message",
            "role": "assistant",
            "model": self._heading.model,
            "content": blocks,
            "usage": usage,
        }

    def _end(self, answer: Answer) -> dict[str, Any]:
        stop_string = answer.choices[0].stop_string
        if stop_string is not None:
            return _ending("stop_sequence", stop_string)
        return _ending(_STOP_REASONS[str(self._finish_reason)])

    def _block(self, index: int, block: Block) -> dict[str, Any]:
        if block.kind == "reasoning":
            return {"type": "thinking", "thinking": block.text, "signature": ""}
        if block.kind == "text":
            return {"type": "text", "text": block.text}
        call_id = f"toolu_{self._heading.response_id.removeprefix(ID_PREFIX)}_{index}"
        return {"type": "tool_use", "id": call_id, "name": block.name, "input": _object(block.text)}

    def _usage(self, answer: Answer) -> dict[str, Any]:
        """Anthropic counts cached tokens apart from the rest of the input."""
        num_cached_tokens = answer.num_cached_tokens
        return {
            "input_tokens": answer.num_prompt_tokens - num_cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": num_cached_tokens,
            "output_tokens": answer.num_tokens,
            "output_tokens_details": {"thinking_tokens": answer.num_reasoning_tokens},
        }


def _event(name: str, **fields: Any) -> bytes:
    return sse({"type": name, **fields}, name)


def _ending(stop_reason: str | None, stop_sequence: str | None = None) -> dict[str, Any]:
    return {"stop_reason": stop_reason, "stop_sequence": stop_sequence, "stop_details": None}


def _delta(block: Block, text: str) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "thinking_delta", "thinking": text}
    if block.kind == "text":
        return {"type": "text_delta", "text": text}
    return {"type": "input_json_delta", "partial_json": text}


def _object(arguments: str) -> dict[str, Any]:
    """A call's arguments; of JSON that was cut off what there is of it, of no JSON at all nothing.

    Clients put streamed arguments together in the same way.
    """
    try:
        value = from_json(arguments, allow_partial=True)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


MESSAGES = Messages()
