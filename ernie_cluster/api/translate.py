"""Other APIs' conversations as chat requests. Errors about the translation name what the client wrote.

A path in the chat request and the path in the client's request that it came from are an *origin*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ernie_cluster.api.schemas import ChatBody, parse_body
from ernie_cluster.errors import InvalidRequest


class Part(Protocol):
    """A text, picture or video among a message's content, in another API's spelling."""

    @property
    def chat(self) -> dict[str, Any]:
        """The same as a part of a chat message."""
        ...

    @property
    def fields(self) -> Mapping[str, str]:
        """Fields that are called otherwise in chat: chat's path within the part -> its own."""
        ...


class Conversation:
    """The messages of a chat request, while it is put together.

    Args:
        fields: origins outside of the messages, and of all messages together.
    """

    def __init__(self, fields: Mapping[str, str]) -> None:
        self.messages: list[dict[str, Any]] = []
        self.origins = dict(fields)

    def add(
        self, role: str, content: str | Sequence[Part], origin: str, *, within: str = "content", start: int = 0
    ) -> dict[str, Any]:
        """A new message.

        Args:
            role: chat's.
            content: text, or parts.
            origin: where it comes from.
            within: the field of `origin` that holds the content; "" where a text itself is the origin.
            start: index there of the first part.

        Returns:
            The message, to which more may be added.
        """
        path = f"messages[{len(self.messages)}]"
        self.origins |= {path: origin, f"{path}.content": f"{origin}.{within}" if within else origin}
        message: dict[str, Any] = {"role": role, "content": content}
        if not isinstance(content, str):
            message["content"] = [part.chat for part in content]
            for i, part in enumerate(content):
                theirs, own = f"{path}.content[{i}]", f"{origin}.{within}[{start + i}]"
                self.origins[theirs] = own
                self.origins |= {f"{theirs}.{a}": f"{own}.{b}" for a, b in part.fields.items()}
        self.messages.append(message)
        return message

    def add_result(self, call_id: str, id_field: str, content: str | Sequence[Part], origin: str, within: str) -> None:
        """What a tool answered to a call; `id_field` of `origin` holds the call's id. Other arguments as in `add`."""
        self.origins[f"messages[{len(self.messages)}].tool_call_id"] = f"{origin}.{id_field}"
        self.add("tool", content, origin, within=within)["tool_call_id"] = call_id


def add_call(message: dict[str, Any], call_id: str, name: str, arguments: str) -> None:
    """Add a call to an assistant's message; `arguments` is JSON text."""
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    message.setdefault("tool_calls", []).append(call)


def add_reasoning(message: dict[str, Any], text: str) -> None:
    """Add to what an assistant's message tells of its reasoning."""
    if text:
        message["reasoning_content"] = message.get("reasoning_content", "") + text


def as_chat(raw: Mapping[str, Any], conversation: Conversation) -> ChatBody:
    """The chat request with these fields and messages; fields that are None are left out.

    Raises:
        InvalidRequest: names the client's own field.
    """
    given = {name: value for name, value in raw.items() if value is not None}
    try:
        return parse_body(ChatBody, given | {"messages": conversation.messages})
    except InvalidRequest as e:
        raise renamed(e, conversation.origins) from None


def renamed(error: InvalidRequest, origins: Mapping[str, str]) -> InvalidRequest:
    """The same error about the client's own field."""
    param = error.param
    if param is None:
        return error
    known = [path for path in origins if param == path or param.startswith((f"{path}.", f"{path}["))]
    if not known:
        return error
    closest = max(known, key=len)
    own = origins[closest] + param[len(closest) :]
    message = error.message.replace(f"{param}:", f"{own}:", 1)
    if "_" in param:  # else it is a word of the language, too
        message = message.replace(param, own)
    return type(error)(message, own, error.code)
