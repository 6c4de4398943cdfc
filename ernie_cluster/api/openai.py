"""OpenAI's chat and text completions: response objects as plain dicts, and the two dialects `CHAT` and `COMPLETION`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from pydantic_core import to_json

from ernie_cluster.api.answer import Answer, Delta
from ernie_cluster.api.dialect import Asked, Heading
from ernie_cluster.api.logprobs import chat_logprobs, completion_logprobs
from ernie_cluster.api.markup import CallPiece, OwnCall
from ernie_cluster.api.prepare import Job
from ernie_cluster.api.schemas import ChatBody, CompletionBody, parse_body
from ernie_cluster.api.status import error_body
from ernie_cluster.api.turns import Choice
from ernie_cluster.request import Span


class ChatForm:
    """`/v1/chat/completions`."""

    id_prefix = "chatcmpl-"
    body_type = ChatBody
    whole_object = "chat.completion"
    has_many_prompts = False
    chunk_object = "chat.completion.chunk"

    def read(self, raw: dict[str, Any]) -> Asked:
        return Asked(parse_body(ChatBody, raw), partial(OpenAiPresentation, self))

    def whole_choice(self, heading: Heading, answer: Delta) -> dict[str, Any]:
        pieces = answer.pieces
        content = pieces.content or (None if pieces.calls else "")
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if pieces.reasoning:
            message["reasoning_content"] = pieces.reasoning
        if pieces.calls:
            message["tool_calls"] = [_call(heading, answer.index, call) for call in pieces.calls]
        if pieces.own_calls:
            message["builtin_tool_calls"] = [_own_call(call) for call in pieces.own_calls]
        logprobs = None if answer.tokens is None else chat_logprobs(answer.tokens)
        return {
            "index": answer.index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": answer.finish_reason,
        }

    def chunk_choice(self, heading: Heading, delta: Delta, *, is_first: bool) -> dict[str, Any]:
        pieces = delta.pieces
        news: dict[str, Any] = {"role": "assistant"} if is_first else {}
        if pieces.content or is_first:
            news["content"] = pieces.content
        if pieces.reasoning:
            news["reasoning_content"] = pieces.reasoning
        if pieces.calls:
            news["tool_calls"] = [{"index": c.index, **_call(heading, delta.index, c)} for c in pieces.calls]
        if pieces.own_calls:
            news["builtin_tool_calls"] = [{"index": c.index, **_own_call(c)} for c in pieces.own_calls]
        logprobs = chat_logprobs(delta.tokens) if delta.tokens else None
        return {"index": delta.index, "delta": news, "logprobs": logprobs, "finish_reason": delta.finish_reason}


def _call(heading: Heading, choice: int, call: CallPiece) -> dict[str, Any]:
    """A call, or the next piece of one; what names it comes with the first piece only."""
    if call.name is None:
        return {"function": {"arguments": call.arguments}}
    call_id = f"call_{heading.response_id.removeprefix(CHAT.id_prefix)}_{choice}_{call.index}"
    return {"id": call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _own_call(call: OwnCall) -> dict[str, Any]:
    """A call that has been run here; it comes in one piece, and no client has to answer it."""
    return {"id": call.call_id, "type": call.name, "arguments": call.arguments, "result": dict(call.result)}


class CompletionForm:
    """`/v1/completions`."""

    id_prefix = "cmpl-"
    body_type = CompletionBody
    whole_object = "text_completion"
    has_many_prompts = True
    chunk_object = "text_completion"

    def read(self, raw: dict[str, Any]) -> Asked:
        return Asked(parse_body(CompletionBody, raw), partial(OpenAiPresentation, self))

    def whole_choice(self, heading: Heading, answer: Delta) -> dict[str, Any]:
        return {
            "index": answer.index,
            "text": answer.pieces.content,
            "logprobs": None if answer.tokens is None else completion_logprobs(answer.tokens),
            "finish_reason": answer.finish_reason,
        }

    def chunk_choice(self, heading: Heading, delta: Delta, *, is_first: bool) -> dict[str, Any]:
        return self.whole_choice(heading, delta)


Form = ChatForm | CompletionForm
CHAT = ChatForm()
COMPLETION = CompletionForm()


class OpenAiPresentation:
    """Shows the choices of one answer side by side."""

    def __init__(self, form: Form, heading: Heading, job: Job, own_spans: Sequence[Span]) -> None:
        self._form = form
        self._heading = heading
        self._job = job
        self._own_spans = own_spans
        self._begun: set[int] = set()
        """Choices that have had their first event."""

    def whole(self, answer: Answer, choices: Sequence[Delta]) -> dict[str, Any]:
        body = whole(self._form, self._heading, choices, self._usage(answer), self._timeline(answer))
        return self._with_ids(body, choices, is_first=True)

    def news(self, deltas: Sequence[Delta]) -> list[bytes]:
        """One event per choice that has something to show."""
        events: list[bytes] = []
        for delta in deltas:
            is_first = delta.index not in self._begun
            if is_first or delta.pieces or delta.finish_reason or self._job.has_token_ids:
                body = chunk(self._form, self._heading, delta, is_first=is_first)
                events.append(sse(self._with_ids(body, [delta], is_first=is_first)))
        self._begun.update(delta.index for delta in deltas)
        return events

    def closing(self, answer: Answer) -> list[bytes]:
        usage = self._usage(answer) if self._job.has_usage else None
        timeline = self._timeline(answer)
        if usage is None and timeline is None:
            return [DONE]
        return [sse(trailer(self._form, self._heading, usage, timeline)), DONE]

    def failure(self, exc: Exception) -> list[bytes]:
        return [sse(error_body(exc))]

    def _with_ids(self, body: dict[str, Any], deltas: Sequence[Delta], *, is_first: bool) -> dict[str, Any]:
        """The same body with token ids where vLLM puts them, if they were asked for; `is_first` of its choices."""
        if self._job.has_token_ids:
            for choice, delta in zip(body["choices"], deltas, strict=True):
                choice["token_ids"] = delta.token_ids
                if is_first:
                    place = choice if self._form.has_many_prompts else body
                    place["prompt_token_ids"] = self._job.requests[delta.index].prompt_token_ids.tolist()
        return body

    def _usage(self, answer: Answer) -> dict[str, Any]:
        return usage_of(answer)

    def _timeline(self, answer: Answer) -> list[dict[str, Any]] | None:
        """The stages of the journey, if they were asked for."""
        return timeline_of(self._own_spans, answer.choices) if self._job.has_timeline else None


def whole(
    form: Form,
    heading: Heading,
    answers: Sequence[Delta],
    usage: dict[str, Any],
    timeline: list[dict[str, Any]] | None,
) -> dict[str, Any]:
    """An answer in one piece; each choice's deltas were added up."""
    body = _object(form.whole_object, heading) | {
        "choices": [form.whole_choice(heading, answer) for answer in answers],
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


def usage_of(answer: Answer) -> dict[str, Any]:
    """Token counts."""
    return {
        "prompt_tokens": answer.num_prompt_tokens,
        "completion_tokens": answer.num_tokens,
        "total_tokens": answer.num_prompt_tokens + answer.num_tokens,
        "prompt_tokens_details": {
            "cached_tokens": answer.num_cached_tokens,
            "image_tokens": answer.num_media_tokens("image"),
            "video_tokens": answer.num_media_tokens("video"),
        },
        "completion_tokens_details": {"reasoning_tokens": answer.num_reasoning_tokens},
    }


def timeline_of(own: Iterable[Span], choices: Sequence[Choice]) -> list[dict[str, Any]]:
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
    try:
        return to_json(value)
    except ValueError:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def sse(value: Any, name: str | None = None) -> bytes:
    """One server-sent event; OpenAI's older routes name none."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + encode(value) + b"\n\n"


DONE = b"data: [DONE]\n\n"


def _object(kind: str, heading: Heading) -> dict[str, Any]:
    return {"id": heading.response_id, "object": kind, "created": heading.created, "model": heading.model}
