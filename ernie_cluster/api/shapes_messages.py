"""What the answers of Anthropic's Messages API look like; built in `anthropic.py`."""

from __future__ import annotations

from typing import Any, Literal

from ernie_cluster.api.shapes import MessagesError, Shape

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class TextAnswer(Shape):
    """Words of the answer."""

    type: Literal["text"]
    text: str


class ThinkingAnswer(Shape):
    """What the model thinks."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseAnswer(Shape):
    """A call of a tool."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


BlockAnswer = TextAnswer | ThinkingAnswer | ToolUseAnswer


class OutputTokensDetails(Shape):
    """Of an answer's tokens."""

    thinking_tokens: int


class MessageUsage(Shape):
    """Token counts; cached tokens are not among the input tokens."""

    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    output_tokens_details: OutputTokensDetails | None = None


class Ending(Shape):
    """Why the answer ends."""

    stop_reason: StopReason | None
    stop_sequence: str | None
    stop_details: None


class MessageAnswer(Ending):
    """An answer."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[BlockAnswer]
    usage: MessageUsage


class MessageStart(Shape):
    """The answer begins."""

    type: Literal["message_start"]
    message: MessageAnswer


class BlockStart(Shape):
    """A block begins."""

    type: Literal["content_block_start"]
    index: int
    content_block: BlockAnswer


class AnswerDelta(Shape):
    """Words that a text block grows by."""

    type: Literal["text_delta"]
    text: str


class ThinkingDelta(Shape):
    """Words that a thought grows by."""

    type: Literal["thinking_delta"]
    thinking: str


class InputDelta(Shape):
    """JSON text that a call's input grows by."""

    type: Literal["input_json_delta"]
    partial_json: str


class BlockDelta(Shape):
    """A block grows."""

    type: Literal["content_block_delta"]
    index: int
    delta: AnswerDelta | ThinkingDelta | InputDelta


class BlockStop(Shape):
    """A block ends."""

    type: Literal["content_block_stop"]
    index: int


class MessageDelta(Shape):
    """The answer ends."""

    type: Literal["message_delta"]
    delta: Ending
    usage: MessageUsage


class MessageStop(Shape):
    """Nothing follows."""

    type: Literal["message_stop"]


MessagesEvent = MessageStart | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop | MessagesError
