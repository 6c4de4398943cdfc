"""OpenAI's response objects, as plain dicts. A route's form is an object: `CHAT` or `COMPLETION`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ernie_cluster.api.answer import ChoiceText, Delta
from ernie_cluster.api.markup import CallPiece, Pieces
from ernie_cluster.api.schemas import ChatBody, CompletionBody, GenerationBody
from ernie_cluster.request import Span


@dataclass(frozen=True, slots=True)
class Heading:
    """What every object of one answer repeats."""

    response_id: str
    created: int
    """Seconds since the epoch."""
    model: str


class ChatForm:
    """`/v1/chat/completions`."""

    body: type[GenerationBody] = ChatBody
    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def whole_choice(self, heading: Heading, index: int, pieces: Pieces, finish_reason: str) -> dict[str, Any]:
        content = pieces.content or (None if pieces.calls else "")
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if pieces.reasoning:
            message["reasoning_content"] = pieces.reasoning
        if pieces.calls:
            message["tool_calls"] = [_call(heading, index, call) for call in pieces.calls]
        return {"index": index, "message": message, "logprobs": None, "finish_reason": finish_reason}

    def chunk_choice(self, heading: Heading, delta: Delta, *, is_first: bool) -> dict[str, Any]:
        pieces = delta.pieces
        news: dict[str, Any] = {"role": "assistant"} if is_first else {}
        if pieces.content or is_first:
            news["content"] = pieces.content
        if pieces.reasoning:
            news["reasoning_content"] = pieces.reasoning
        if pieces.calls:
            news["tool_calls"] = [{"index": c.index, **_call(heading, delta.index, c)} for c in pieces.calls]
        return {"index": delta.index, "delta": news, "logprobs": None, "finish_reason": delta.finish_reason}


def _call(heading: Heading, choice: int, call: CallPiece) -> dict[str, Any]:
    """A call, or the next piece of one; what names it comes with the first piece only."""
    if call.name is None:
        return {"function": {"arguments": call.arguments}}
    call_id = f"call_{heading.response_id.removeprefix(CHAT.id_prefix)}_{choice}_{call.index}"
    return {"id": call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


class CompletionForm:
    """`/v1/completions`."""

    body: type[GenerationBody] = CompletionBody
    id_prefix = "cmpl-"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def whole_choice(self, heading: Heading, index: int, pieces: Pieces, finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": pieces.content, "logprobs": None, "finish_reason": finish_reason}

    def chunk_choice(self, heading: Heading, delta: Delta, *, is_first: bool) -> dict[str, Any]:
        return self.whole_choice(heading, delta.index, delta.pieces, delta.finish_reason)


Form = ChatForm | CompletionForm
CHAT = ChatForm()
COMPLETION = CompletionForm()


def whole(
    form: Form,
    heading: Heading,
    answers: Sequence[Pieces],
    choices: Sequence[ChoiceText],
    usage: dict[str, Any],
    timeline: list[dict[str, Any]] | None,
) -> dict[str, Any]:
    """An answer in one piece."""
    body = _object(form.whole_object, heading) | {
        "choices": [
            form.whole_choice(heading, choice.index, pieces, str(choice.finish_reason))
            for choice, pieces in zip(choices, answers, strict=True)
        ],
        "usage": usage,
    }
    return body if timeline is None else body | {"timeline": timeline}


def chunk(form: Form, heading: Heading, delta: Delta, *, is_first: bool) -> dict[str, Any]:
    """One piece of a streamed answer; `is_first` of its choice."""
    return _object(form.chunk_object, heading) | {"choices": [form.chunk_choice(heading, delta, is_first=is_first)]}


def trailer(
    form: Form, heading: Heading, usage: dict[str, Any] | None, timeline: list[dict[str, Any]] | None
) -> dict[str, Any]:
    """The chunk without choices that ends a stream, for clients that asked for usage or timeline."""
    extra = {"usage": usage, "timeline": timeline}
    body = _object(form.chunk_object, heading) | {"choices": []}
    return body | {name: value for name, value in extra.items() if value is not None}


def usage_of(
    num_prompt_tokens: int, num_completion_tokens: int, num_cached_tokens: int, num_reasoning_tokens: int
) -> dict[str, Any]:
    """Token counts."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": num_cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": num_reasoning_tokens},
    }


def timeline_of(own: Iterable[Span], choices: Sequence[ChoiceText]) -> list[dict[str, Any]]:
    """The stages of a request's journey by start time; with several choices, each backend stage says whose it is."""
    stages = [_stage(span) for span in own]
    for choice in choices:
        whose = {"choice": choice.index} if len(choices) > 1 else {}
        stages += [_stage(span) | whose for span in choice.spans]
    return sorted(stages, key=lambda stage: float(stage["start_s"]))


def _stage(span: Span) -> dict[str, Any]:
    detail: dict[str, Any] = {}
    for key, value in span.detail:  # a key may come several times, for example each reason for a route
        detail[key] = [*detail[key], value] if key in detail else [value]
    flat = {key: values if len(values) > 1 else values[0] for key, values in detail.items()}
    return {**flat, "name": span.name, "start_s": span.start_s, "duration_s": span.duration_s}


def model_card(name: str, created: int, max_model_len: int) -> dict[str, Any]:
    """OpenAI's model object, and how long its context is."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "ernie_cluster",
        "max_model_len": max_model_len,
    }


def encode(value: Any) -> bytes:
    """JSON, UTF-8; half a surrogate pair in an error text becomes a question mark instead of an error of its own."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def sse(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + encode(value) + b"\n\n"


DONE = b"data: [DONE]\n\n"


def _object(kind: str, heading: Heading) -> dict[str, Any]:
    return {"id": heading.response_id, "object": kind, "created": heading.created, "model": heading.model}
