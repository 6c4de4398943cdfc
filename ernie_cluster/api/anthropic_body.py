"""Request body of Anthropic's Messages API, and how it reads as a chat request.

A message's content is a list of blocks here. A user's holds tool results, too, which are messages of their own in
chat; an assistant's holds its thought, text and calls, which in chat are fields of one message.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from ernie_cluster.api.anthropic_blocks import (
    AssistantMessage,
    Message,
    ResultBlock,
    SystemMessage,
    TextBlock,
    ThinkingBlock,
    ToolUseBlock,
    UserMessage,
    joined,
)
from ernie_cluster.api.schemas import ChatBody, Count, Name, Priority, StopString
from ernie_cluster.api.tool_schemas import EitherTool, OwnTool
from ernie_cluster.api.translate import Conversation, add_call, add_reasoning, as_chat
from ernie_cluster.api.validate import Strict, list_tag, refuse_unsupported, type_tag, validated
from ernie_cluster.errors import InvalidRequest


class Tool(Strict):
    """A function that the model may call."""

    type: Literal["custom"] | None = None
    name: Name
    description: str | None = None
    input_schema: dict[str, Any]

    @property
    def chat(self) -> dict[str, Any]:
        described = {} if self.description is None else {"description": self.description}
        return {"type": "function", "function": {"name": self.name, **described, "parameters": self.input_schema}}


class ServerTool(OwnTool):
    """A tool that runs here."""

    @property
    def chat(self) -> dict[str, Any]:
        return {"type": self.type}


class ToolChoice(Strict):
    """Whether and what to call."""

    type: Literal["auto", "any", "none"]
    disable_parallel_tool_use: bool | None = None

    @property
    def chat(self) -> Any:
        return "required" if self.type == "any" else self.type


class NamedToolChoice(Strict):
    """What to call."""

    type: Literal["tool"]
    name: str
    disable_parallel_tool_use: bool | None = None

    @property
    def chat(self) -> Any:
        return {"type": "function", "function": {"name": self.name}}


class Thinking(Strict):
    """Whether to think, and how much at most."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=1)] | None = None


class JsonFormat(Strict):
    """What an answer's text must look like."""

    type: Literal["json_schema"]
    definition: dict[str, Any] = Field(alias="schema")


class OutputConfig(Strict):
    """How the answer is to be written."""

    format: JsonFormat | None = None


class Metadata(Strict):
    """About a request."""

    user_id: str | None = None


class PromptBody(Strict):
    """What makes a prompt; all of the body of `POST /v1/messages/count_tokens`."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    system: (
        Annotated[
            Annotated[str, Tag("<text>")] | Annotated[list[TextBlock], Field(fail_fast=True), Tag("<list>")],
            Discriminator(list_tag),
        ]
        | None
    ) = None
    tools: Annotated[list[EitherTool[Tool, ServerTool]], Field(fail_fast=True)] | None = None
    tool_choice: (
        Annotated[
            Annotated[NamedToolChoice, Tag("<tool>")] | Annotated[ToolChoice, Tag("<mode>")],
            Discriminator(lambda value: "<tool>" if type_tag(value) == "<tool>" else "<mode>"),
        ]
        | None
    ) = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None


class MessagesBody(PromptBody):
    """Body of `POST /v1/messages`."""

    max_tokens: Count
    metadata: Metadata | None = None
    stop_sequences: Annotated[list[StopString], Field(fail_fast=True)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    priority: Priority | None = None
    allow_smaller_model: bool | None = None
    """Ours, both as in a chat."""


HARMLESS: dict[str, tuple[Any, ...]] = {"container": (None,), "mcp_servers": (None, []), "prefill": (None,)}
"""Fields that are not supported, and the values with which they ask for nothing."""

_FIELDS = {
    "stop": "stop_sequences",
    "enable_thinking": "thinking",
    "max_thinking_tokens": "thinking.budget_tokens",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
    "response_format": "output_config.format",
    "response_format.json_schema": "output_config.format",
    "tool_choice.function": "tool_choice",
}
"""What is called otherwise in chat: chat's path -> that here."""


def read_messages(raw: Mapping[str, Any]) -> tuple[ChatBody, Mapping[str, str]]:
    """The chat request that means the same as a request for a message, and the origins of its fields.

    Raises:
        InvalidRequest: names the field at fault.
    """
    refuse_unsupported(raw, HARMLESS)
    body = validated(MessagesBody, raw)
    conversation = _conversation(body)
    fields = _prompt_fields(body) | {
        "max_tokens": body.max_tokens,
        "stop": body.stop_sequences,
        "stream": body.stream,
        "temperature": body.temperature,
        "top_k": body.top_k,
        "top_p": body.top_p,
        "user": body.metadata.user_id if body.metadata else None,
        "priority": body.priority,
        "allow_smaller_model": body.allow_smaller_model,
    }
    return as_chat(fields, conversation), conversation.origins


def read_prompt(raw: Mapping[str, Any]) -> tuple[ChatBody, Mapping[str, str]]:
    """As `read_messages`, of a request that only asks how long its prompt is."""
    refuse_unsupported(raw, HARMLESS)
    body = validated(PromptBody, raw)
    conversation = _conversation(body)
    return as_chat(_prompt_fields(body), conversation), conversation.origins


def _prompt_fields(body: PromptBody) -> dict[str, Any]:
    choice = body.tool_choice
    wanted = body.output_config.format if body.output_config else None
    return {
        "model": body.model,
        "tools": body.tools and [tool.chat for tool in body.tools],
        "tool_choice": choice.chat if choice else None,
        "parallel_tool_calls": False if choice and choice.disable_parallel_tool_use else None,
        "enable_thinking": None if body.thinking is None else body.thinking.type != "disabled",
        "max_thinking_tokens": None if body.thinking is None else body.thinking.budget_tokens,
        "response_format": wanted
        and {"type": "json_schema", "json_schema": {"name": "answer", "schema": wanted.definition}},
    }


def _conversation(body: PromptBody) -> Conversation:
    if isinstance(body.messages[-1], AssistantMessage):
        param = f"messages[{len(body.messages) - 1}].role"
        raise InvalidRequest(
            f"{param}: the last message is the assistant's, and answers cannot be begun for the model here; end with a "
            "user's message",
            param,
        )
    conversation = Conversation(_FIELDS | _tool_fields(len(body.tools or ())))
    if body.system:
        conversation.add("system", joined(body.system), "system", within="")
    for i, message in enumerate(body.messages):
        origin = f"messages[{i}]"
        if isinstance(message, SystemMessage):
            conversation.add("system", joined(message.content), origin)
        elif isinstance(message.content, str):
            conversation.add(message.role, message.content, origin)
        elif isinstance(message, UserMessage):
            _add_user(conversation, message, origin)
        else:
            _add_assistant(conversation, message, origin)
    return conversation


def _tool_fields(num_tools: int) -> dict[str, str]:
    fields = {}
    for i in range(num_tools):
        fields[f"tools[{i}].function"] = f"tools[{i}]"
        fields[f"tools[{i}].function.parameters"] = f"tools[{i}].input_schema"
    return fields


def _add_user(conversation: Conversation, message: UserMessage, origin: str) -> None:
    """A message per tool result, and one per run of other blocks."""
    for start, run in message.runs():
        if isinstance(run, ResultBlock):
            block = f"{origin}.content[{start}]"
            conversation.add_result(run.tool_use_id, "tool_use_id", run.content or "", block, "content")
        else:
            conversation.add("user", run, origin, start=start)


def _add_assistant(conversation: Conversation, message: AssistantMessage, origin: str) -> None:
    assert not isinstance(message.content, str)
    turn = conversation.add("assistant", "", origin)
    for block in message.content:
        if isinstance(block, ThinkingBlock):
            add_reasoning(turn, block.thinking)
        elif isinstance(block, TextBlock):
            turn["content"] += block.text
        elif isinstance(block, ToolUseBlock):
            add_call(turn, block.id, block.name, json.dumps(block.input, ensure_ascii=False))
