"""Answers as messages of the proto: the two generation routes, whole and in pieces."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from ernie_cluster.api.answer import TOOL_CALLS, Answer, Delta
from ernie_cluster.api.dialect import Asked, Heading
from ernie_cluster.api.grpc_body import chat_body, generate_body
from ernie_cluster.api.limits import ApiLimits
from ernie_cluster.api.markup import OwnCall
from ernie_cluster.api.prepare import Job
from ernie_cluster.proto.v1 import inference_pb2 as pb
from ernie_cluster.request import FinishReason, Span

Choice = pb.ChatChoice | pb.ChatDelta | pb.GenerateChoice

_FINISH_REASONS = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    TOOL_CALLS: pb.FINISH_REASON_TOOL_CALLS,
}


class ChatCall:
    """`Chat`, and `StreamChat` with `is_stream`."""

    id_prefix = "chatcmpl-"
    whole = pb.ChatResponse
    chunk = pb.ChatChunk

    def __init__(self, limits: ApiLimits, *, is_stream: bool) -> None:
        self._limits = limits
        self._is_stream = is_stream

    def read(self, raw: pb.ChatRequest) -> Asked:
        found = chat_body(raw, self._limits, is_stream=self._is_stream)
        return Asked(found.body, partial(GrpcPresentation, self), found.origins, found.content)

    def whole_choice(self, heading: Heading, answer: Delta) -> pb.ChatChoice:
        pieces = answer.pieces
        calls = [
            pb.ToolCall(id=_call_id(heading, answer.index, call.index), name=call.name or "", arguments=call.arguments)
            for call in pieces.calls
        ]
        return pb.ChatChoice(
            index=answer.index,
            message=pb.Message(
                role=pb.ROLE_ASSISTANT, text=pieces.content, reasoning=pieces.reasoning, tool_calls=calls
            ),
            finish_reason=_FINISH_REASONS[answer.finish_reason],
            logprobs=_tokens(answer),
            builtin_tool_calls=map(_own_call, pieces.own_calls),
        )

    def chunk_choice(self, heading: Heading, delta: Delta) -> pb.ChatDelta:
        pieces = delta.pieces
        calls = [
            pb.ToolCallDelta(
                index=call.index,
                id="" if call.name is None else _call_id(heading, delta.index, call.index),
                name=call.name or "",
                arguments=call.arguments,
            )
            for call in pieces.calls
        ]
        return pb.ChatDelta(
            index=delta.index,
            text=pieces.content,
            reasoning=pieces.reasoning,
            tool_calls=calls,
            finish_reason=_FINISH_REASONS[delta.finish_reason],
            logprobs=_tokens(delta),
            builtin_tool_calls=map(_own_call, pieces.own_calls),
        )


class GenerateCall:
    """`Generate`, and `StreamGenerate` with `is_stream`."""

    id_prefix = "cmpl-"
    whole = pb.GenerateResponse
    chunk = pb.GenerateChunk

    def __init__(self, *, is_stream: bool) -> None:
        self._is_stream = is_stream

    def read(self, raw: pb.GenerateRequest) -> Asked:
        found = generate_body(raw, is_stream=self._is_stream)
        return Asked(found.body, partial(GrpcPresentation, self), found.origins)

    def whole_choice(self, heading: Heading, answer: Delta) -> pb.GenerateChoice:
        return pb.GenerateChoice(
            index=answer.index,
            text=answer.pieces.content,
            finish_reason=_FINISH_REASONS[answer.finish_reason],
            logprobs=_tokens(answer),
        )

    def chunk_choice(self, heading: Heading, delta: Delta) -> pb.GenerateChoice:
        return self.whole_choice(heading, delta)


class GrpcPresentation:
    """Shows the choices of one answer side by side; each event is a serialized message."""

    def __init__(self, form: ChatCall | GenerateCall, heading: Heading, job: Job, own_spans: Sequence[Span]) -> None:
        self._form = form
        self._heading = heading
        self._job = job
        self._own_spans = own_spans
        self._has_begun = False

    def whole(self, answer: Answer, choices: Sequence[Delta]) -> bytes:
        shown = [self._with_ids(self._form.whole_choice(self._heading, choice), choice) for choice in choices]
        return self._bytes(self._form.whole, choices=shown, **self._begin(), **self._end(answer))

    def news(self, deltas: Sequence[Delta]) -> list[bytes]:
        """One chunk for all choices that have something to show."""
        shown = [
            self._with_ids(self._form.chunk_choice(self._heading, delta), delta)
            for delta in deltas
            if delta.pieces or delta.finish_reason or delta.tokens or (self._job.has_token_ids and delta.token_ids)
        ]
        return [self._bytes(self._form.chunk, choices=shown, **self._begin())] if shown else []

    def closing(self, answer: Answer) -> list[bytes]:
        return [self._bytes(self._form.chunk, **self._end(answer))]

    def failure(self, exc: Exception) -> list[bytes]:
        return []  # the call's status tells it

    def _with_ids(self, choice: Choice, delta: Delta) -> Choice:
        """The same with its token ids, if they were asked for."""
        if self._job.has_token_ids:
            choice.token_ids.extend(delta.token_ids)
        return choice

    def _begin(self) -> dict[str, Any]:
        """What the first message tells; all choices have the same prompt."""
        if self._has_begun or not self._job.has_token_ids:
            return {}
        self._has_begun = True
        return {"prompt_token_ids": self._job.requests[0].prompt_token_ids.tolist()}

    def _bytes(self, kind: Any, **fields: Any) -> bytes:
        heading = self._heading
        message = kind(id=heading.response_id, created=heading.created, model=heading.model, **fields)
        serialized: bytes = message.SerializeToString()
        return serialized

    def _end(self, answer: Answer) -> dict[str, Any]:
        usage = pb.Usage(
            prompt_tokens=answer.num_prompt_tokens,
            completion_tokens=answer.num_tokens,
            cached_tokens=answer.num_cached_tokens,
            reasoning_tokens=answer.num_reasoning_tokens,
            image_tokens=answer.num_media_tokens("image"),
            video_tokens=answer.num_media_tokens("video"),
        )
        return {"usage": usage, "timeline": self._timeline(answer) if self._job.has_timeline else []}

    def _timeline(self, answer: Answer) -> list[pb.Stage]:
        """The stages of the journey by start time; with several choices, each backend stage says whose it is."""
        stages = [_stage(span) for span in self._own_spans]
        for choice in answer.choices:
            whose = {"choice": choice.index} if len(answer.choices) > 1 else {}
            stages += [_stage(span, **whose) for span in choice.spans]
        return sorted(stages, key=lambda stage: stage.start_s)


def _stage(span: Span, **whose: int) -> pb.Stage:
    details = [pb.Detail(key=key, value=str(value)) for key, value in span.detail]
    return pb.Stage(name=span.name, start_s=span.start_s, duration_s=span.duration_s, details=details, **whose)


def _tokens(delta: Delta) -> list[pb.Token]:
    return [pb.Token(token=t.token, logprob=t.logprob, top=_ranked(t.top)) for t in delta.tokens or ()]


def _ranked(top: Iterable[tuple[bytes, float]]) -> list[pb.RankedToken]:
    return [pb.RankedToken(token=token, logprob=logprob) for token, logprob in top]


def _own_call(call: OwnCall) -> pb.BuiltinToolCall:
    result = dict(call.result)
    told = {name: result.pop(name) for name in ("text", "error") if name in result}
    images = [_tool_image(**image) for image in result.pop("images", ())]
    details = json.dumps(result, ensure_ascii=False)
    return pb.BuiltinToolCall(
        id=call.call_id, name=call.name, arguments=call.arguments, images=images, details=details, **told
    )


def _tool_image(width: int, height: int, url: str | None = None) -> pb.ToolImage:
    data = None if url is None else base64.b64decode(url.partition(",")[2])
    return pb.ToolImage(width=width, height=height, data=data)


def _call_id(heading: Heading, choice: int, call: int) -> str:
    return f"call_{heading.response_id.removeprefix(ChatCall.id_prefix)}_{choice}_{call}"
