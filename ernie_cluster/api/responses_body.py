"""Request body of OpenAI's Responses API, and how it reads as a chat request.

A conversation is a list of items here. An assistant's turn is a run of them: a thought, text and calls in the order
in which they were made; in chat it is one message. Nothing is stored, so every request brings the whole conversation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from ernie_cluster.api.responses_items import AssistantMessage, CallItem, InputMessage, Item, ReasoningItem, ResultItem
from ernie_cluster.api.schemas import ChatBody, Count, Name, Priority
from ernie_cluster.api.tool_schemas import EitherTool, OwnTool
from ernie_cluster.api.translate import Conversation, add_call, add_reasoning, as_chat
from ernie_cluster.api.validate import Strict, list_tag, refuse_unsupported, validated
from ernie_cluster.errors import InvalidRequest


class FunctionTool(Strict):
    """A function that the model may call."""

    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Reasoning(Strict):
    """How much to think."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


class TextFormat(Strict):
    """What an answer's text must look like."""

    type: Literal["text", "json_object", "json_schema"]
    name: str = "answer"
    definition: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    @property
    def chat(self) -> dict[str, Any]:
        if self.type != "json_schema":
            return {"type": self.type}
        return {"type": self.type, "json_schema": {"name": self.name, "schema": self.definition, "strict": self.strict}}


class TextOptions(Strict):
    """How the answer is to be written."""

    format: TextFormat | None = None


class FunctionChoice(Strict):
    """A function that the model has to call."""

    type: Literal["function"]
    name: str


class ResponsesBody(Strict):
    """Body of `POST /v1/responses`. None means: not given."""

    model: str
    input: Annotated[
        Annotated[str, Tag("<text>")] | Annotated[list[Item], Field(min_length=1, fail_fast=True), Tag("<list>")],
        Discriminator(list_tag),
    ]
    instructions: str | None = None
    tools: Annotated[list[EitherTool[FunctionTool, OwnTool]], Field(fail_fast=True)] | None = None
    tool_choice: (
        Annotated[
            Annotated[Literal["none", "auto", "required"], Tag("<mode>")] | Annotated[FunctionChoice, Tag("<object>")],
            Discriminator(lambda value: "<object>" if isinstance(value, dict) else "<mode>"),
        ]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    max_output_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stream: bool | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    user: str | None = None
    priority: Priority | None = None
    allow_smaller_model: bool | None = None
    """Ours, both as in a chat."""


HARMLESS: dict[str, tuple[Any, ...]] = {
    "background": (None, False),
    "conversation": (None,),
    "include": (None, [], ["reasoning.encrypted_content"]),  # nothing is encrypted: the content itself is there
    "prompt": (None,),
    "top_logprobs": (None, 0),
    "truncation": (None, "disabled"),
}
"""Fields that are not supported, and the values with which they ask for nothing."""

_FIELDS = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
    "response_format.json_schema": "text.format",
    "tool_choice.function": "tool_choice",
}
"""What is called otherwise in chat: chat's path -> that here."""

_CONTINUES: dict[type[Strict], tuple[type[Strict], ...]] = {
    ReasoningItem: (ReasoningItem,),
    AssistantMessage: (ReasoningItem, CallItem),
    CallItem: (ReasoningItem, AssistantMessage, CallItem),
}
"""Items of the assistant, and behind which others they go on with the same turn."""


def read_responses(raw: Mapping[str, Any]) -> tuple[ResponsesBody, ChatBody, Mapping[str, str]]:
    """The body, the chat request that means the same, and the origins of its fields.

    Raises:
        InvalidRequest: names the field at fault.
    """
    if raw.get("previous_response_id") is not None:
        raise InvalidRequest(
            "previous_response_id is not supported: no response is stored here; send the whole conversation as input",
            "previous_response_id",
            "unsupported_parameter",
        )
    refuse_unsupported(raw, HARMLESS)
    body = validated(ResponsesBody, raw)
    conversation = _conversation(body)
    return body, as_chat(_chat_fields(body), conversation), conversation.origins


def _chat_fields(body: ResponsesBody) -> dict[str, Any]:
    choice = body.tool_choice
    return {
        "model": body.model,
        "tools": body.tools and [_tool(tool) for tool in body.tools],
        "tool_choice": {"type": "function", "function": {"name": choice.name}}
        if isinstance(choice, FunctionChoice)
        else choice,
        "parallel_tool_calls": body.parallel_tool_calls,
        "reasoning_effort": body.reasoning.effort if body.reasoning else None,
        "response_format": body.text.format.chat if body.text and body.text.format else None,
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "stream": body.stream,
        "user": body.user,
        "priority": body.priority,
        "allow_smaller_model": body.allow_smaller_model,
    }


def _tool(tool: FunctionTool | OwnTool) -> dict[str, Any]:
    if isinstance(tool, OwnTool):
        return {"type": tool.type}
    return {"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"type"})}


def _conversation(body: ResponsesBody) -> Conversation:
    tools = {f"tools[{i}].function": f"tools[{i}]" for i in range(len(body.tools or ()))}
    conversation = Conversation(_FIELDS | tools)
    if body.instructions:
        conversation.add("system", body.instructions, "instructions", within="")
    if isinstance(body.input, str):
        conversation.add("user", body.input, "input", within="")
        return conversation
    previous: Strict | None = None
    for i, item in enumerate(body.input):
        origin = f"input[{i}]"
        if isinstance(item, InputMessage):
            conversation.add(item.role, item.content, origin)
        elif isinstance(item, ResultItem):
            conversation.add_result(item.call_id, "call_id", item.output, origin, "output")
        else:
            if not isinstance(previous, _CONTINUES[type(item)]):
                conversation.add("assistant", "", origin)
            _extend(conversation.messages[-1], item)
        previous = item
    return conversation


def _extend(turn: dict[str, Any], item: ReasoningItem | AssistantMessage | CallItem) -> None:
    if isinstance(item, ReasoningItem):
        add_reasoning(turn, item.text)
    elif isinstance(item, AssistantMessage):
        turn["content"] += item.text
    else:
        add_call(turn, item.call_id, item.name, item.arguments)
