"""What OpenAI's chat and text completions look like; built in `openai.py` and `logprobs.py`."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict

from ernie_cluster.api.shapes import Error, Shape

FinishReason = Literal["stop", "length", "tool_calls"]


class PromptTokensDetails(Shape):
    """Of a prompt's tokens."""

    cached_tokens: int
    image_tokens: int
    video_tokens: int


class CompletionTokensDetails(Shape):
    """Of an answer's tokens."""

    reasoning_tokens: int


class Usage(Shape):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class Stage(Shape):
    """A stage of a request's journey, with details of its own."""

    model_config = ConfigDict(extra="allow")

    name: str
    start_s: float
    """Seconds since the epoch."""
    duration_s: float


class TopToken(Shape):
    """A token that could have stood there."""

    token: str
    logprob: float
    bytes: list[int]


class ChatToken(TopToken):
    """A token of the content."""

    top_logprobs: list[TopToken]


class ChatLogprobs(Shape):
    """Log-probabilities of the content's tokens."""

    content: list[ChatToken]
    refusal: None


class CalledFunctionAnswer(Shape):
    """A function that the model calls; in a stream the arguments come in pieces, and the name with the first."""

    name: str | None = None
    arguments: str
    """JSON text."""


class CallAnswer(Shape):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunctionAnswer


class CallPieceAnswer(Shape):
    """A piece of a call."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunctionAnswer


class ChatMessage(Shape):
    """What the model says."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    tool_calls: list[CallAnswer] | None = None


class ChatChoice(Shape):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatAnswer(Shape):
    """Answers to a chat."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    timeline: list[Stage] | None = None


class ChatDelta(Shape):
    """What is new in an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[CallPieceAnswer] | None = None


class ChatChunkChoice(Shape):
    """A piece of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(Shape):
    """A piece of streamed answers; the last one, without choices, has usage and timeline where they were asked for."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    timeline: list[Stage] | None = None


class CompletionLogprobs(Shape):
    """Log-probabilities of a text's tokens."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(Shape):
    """One answer, or a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class CompletionChunk(Shape):
    """A piece of streamed texts."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    timeline: list[Stage] | None = None


class CompletionAnswer(CompletionChunk):
    """Texts that go on after the prompts."""

    usage: Usage


ChatEvent = ChatChunk | Error
CompletionEvent = CompletionChunk | Error
"""An error ends a stream, which then lacks its `[DONE]`."""
