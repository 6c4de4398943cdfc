"""What the answers of OpenAI's Responses API look like; built in `responses.py`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ernie_cluster.api.shapes import Shape

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(Shape):
    """Words of the answer."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any] = Field(max_length=0)
    logprobs: list[Any] = Field(max_length=0)


class ThoughtText(Shape):
    """Words of a thought."""

    type: Literal["reasoning_text"]
    text: str


class MessageOutput(Shape):
    """What the model says."""

    type: Literal["message"]
    id: str
    status: ItemStatus
    role: Literal["assistant"]
    content: list[OutputText]


class ReasoningOutput(Shape):
    """What the model thinks."""

    type: Literal["reasoning"]
    id: str
    status: ItemStatus
    summary: list[Any] = Field(max_length=0)
    content: list[ThoughtText]
    encrypted_content: None


class CallOutput(Shape):
    """A call of a function."""

    type: Literal["function_call"]
    id: str
    status: ItemStatus
    call_id: str
    name: str
    arguments: str
    """JSON text."""


Output = MessageOutput | ReasoningOutput | CallOutput


class InputDetails(Shape):
    """Of a prompt's tokens."""

    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(Shape):
    """Of an answer's tokens."""

    reasoning_tokens: int


class ResponseUsage(Shape):
    """Token counts."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseFault(Shape):
    """Why there is no answer."""

    code: str
    message: str


class IncompleteDetails(Shape):
    """Why an answer is cut short."""

    reason: Literal["max_output_tokens"]


class ReasoningEcho(Shape):
    """How much was to be thought."""

    effort: str | None
    summary: None


class Response(Shape):
    """An answer, and what its request asked for."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseFault | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[Output]
    usage: ResponseUsage | None
    background: Literal[False]
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: ReasoningEcho
    store: Literal[False]
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float
    truncation: Literal["disabled"]
    user: str | None


class Numbered(Shape):
    """What all events have."""

    sequence_number: int


class ResponseEvent(Numbered):
    """The answer begins, or ends."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    response: Response


class ItemEvent(Numbered):
    """An item begins or ends."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: Output


class Placed(Numbered):
    """Where in the answer something happens."""

    item_id: str
    output_index: int


class PartEvent(Placed):
    """A part of an item begins or ends."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    content_index: int
    part: OutputText | ThoughtText


class ThoughtDelta(Placed):
    """A thought grows."""

    type: Literal["response.reasoning_text.delta"]
    content_index: int
    delta: str


class ThoughtDone(Placed):
    """A thought ends."""

    type: Literal["response.reasoning_text.done"]
    content_index: int
    text: str


class TextDelta(Placed):
    """A text grows."""

    type: Literal["response.output_text.delta"]
    content_index: int
    delta: str
    logprobs: list[Any] = Field(max_length=0)


class TextDone(Placed):
    """A text ends."""

    type: Literal["response.output_text.done"]
    content_index: int
    text: str
    logprobs: list[Any] = Field(max_length=0)


class ArgumentsDelta(Placed):
    """A call's arguments grow."""

    type: Literal["response.function_call_arguments.delta"]
    delta: str


class ArgumentsDone(Placed):
    """A call's arguments end."""

    type: Literal["response.function_call_arguments.done"]
    arguments: str


class ErrorEvent(Numbered):
    """The answer cannot be finished; `response.failed` follows."""

    type: Literal["error"]
    code: str
    message: str
    param: str | None


ResponsesEvent = (
    ResponseEvent
    | ItemEvent
    | PartEvent
    | ThoughtDelta
    | ThoughtDone
    | TextDelta
    | TextDone
    | ArgumentsDelta
    | ArgumentsDone
    | ErrorEvent
)
