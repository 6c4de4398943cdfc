"""gRPC's requests as chat and text completions. Files stay bytes, errors name the fields of the proto."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ernie_cluster.api.body import parse_object
from ernie_cluster.api.limits import ApiLimits
from ernie_cluster.api.schemas import CompletionBody, GenerationBody, parse_body
from ernie_cluster.api.translate import Conversation, add_call, add_reasoning, as_chat, renamed
from ernie_cluster.errors import InvalidRequest
from ernie_cluster.proto.v1 import inference_pb2 as pb
from ernie_cluster.request import MediaKind

_ROLES = {pb.ROLE_SYSTEM: "system", pb.ROLE_USER: "user", pb.ROLE_ASSISTANT: "assistant", pb.ROLE_TOOL: "tool"}
_TOOL_MODES = {
    pb.ToolChoice.MODE_AUTO: "auto",
    pb.ToolChoice.MODE_NONE: "none",
    pb.ToolChoice.MODE_REQUIRED: "required",
}
_EFFORTS = {
    number: name.removeprefix("REASONING_EFFORT_").lower() for name, number in pb.ReasoningEffort.items() if number
}
_FIELDS = {
    **{name: f"sampling.{name}" for name in pb.Sampling.DESCRIPTOR.fields_by_name},
    "top_logprobs": "sampling.logprobs",
    "response_format": "response_format.json_object",
    "guided_json": "response_format.json_schema",
    "guided_regex": "response_format.regex",
    "guided_choice": "response_format.choice.texts",
    "tool_choice.function.name": "tool_choice.function",
}
"""Fields of a body that come from elsewhere in a request."""


@dataclass(frozen=True, slots=True)
class Translated:
    """A request as a body of ours; fields as of `Asked`."""

    body: GenerationBody
    origins: Mapping[str, str]
    content: dict[tuple[MediaKind, str], bytes] = field(default_factory=dict)


def chat_body(request: pb.ChatRequest, limits: ApiLimits, *, is_stream: bool) -> Translated:
    """Raises InvalidRequest, naming the field of the proto."""
    content: dict[tuple[MediaKind, str], bytes] = {}
    conversation = Conversation(_FIELDS)
    for i, message in enumerate(request.messages):
        _add(message, f"messages[{i}]", conversation, content)
    sampling = _sampling(request.sampling)
    if "logprobs" in sampling:
        sampling |= {"logprobs": True, "top_logprobs": sampling["logprobs"]}
    raw = {
        **_common(request, is_stream),
        **sampling,
        "tools": [_tool(tool, i, conversation, limits) for i, tool in enumerate(request.tools)] or None,
        "tool_choice": _tool_choice(request.tool_choice),
        "reasoning_effort": _EFFORTS.get(request.reasoning_effort, "unknown") if request.reasoning_effort else None,
        "include_tool_results": request.include_tool_results,
        **_given(request, "enable_thinking", "parallel_tool_calls", "max_thinking_tokens"),
    }
    return Translated(as_chat(raw, conversation), conversation.origins, content)


def generate_body(request: pb.GenerateRequest, *, is_stream: bool) -> Translated:
    """Raises InvalidRequest, naming the field of the proto."""
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise InvalidRequest("text: give text or tokens", "text")
    prompt = request.text if kind == "text" else list(request.tokens.ids)
    origins = {**_FIELDS, "prompt": "text" if kind == "text" else "tokens.ids"}
    raw = {**_common(request, is_stream), **_sampling(request.sampling), "prompt": prompt}
    try:
        return Translated(parse_body(CompletionBody, raw), origins)
    except InvalidRequest as e:
        raise renamed(e, origins) from None


def _common(request: pb.ChatRequest | pb.GenerateRequest, is_stream: bool) -> dict[str, Any]:
    return {
        "model": request.model,
        "stream": is_stream,
        "include_timeline": request.include_timeline,
        "return_token_ids": request.return_token_ids,
        "allow_smaller_model": request.allow_smaller_model,
        **_given(request, "cache_salt", "priority"),
        **_format(request.response_format),
    }


def _given(request: pb.ChatRequest | pb.GenerateRequest, *names: str) -> dict[str, Any]:
    """Those of these fields that are set."""
    return {name: getattr(request, name) for name in names if request.HasField(name)}


def _sampling(sampling: pb.Sampling) -> dict[str, Any]:
    """What is set, in OpenAI's and vLLM's spelling, which is the proto's."""
    found = {descriptor.name: value for descriptor, value in sampling.ListFields()}
    given: dict[str, Any] = {
        "logit_bias": {str(token): value for token, value in sampling.logit_bias.items()},
        "stop": list(sampling.stop),
        "stop_token_ids": list(sampling.stop_token_ids),
    }
    return {name: given.get(name, value) for name, value in found.items()}


def _format(wanted: pb.ResponseFormat) -> dict[str, Any]:
    kind = wanted.WhichOneof("kind")
    if kind == "json_schema":
        return {"guided_json": wanted.json_schema}
    if kind == "regex":
        return {"guided_regex": wanted.regex}
    if kind == "choice":
        return {"guided_choice": list(wanted.choice.texts)}
    return {"response_format": {"type": "json_object"}} if wanted.json_object else {}


def _add(
    message: pb.Message, origin: str, conversation: Conversation, content: dict[tuple[MediaKind, str], bytes]
) -> None:
    has_text = message.HasField("text")
    if has_text and message.parts:
        raise InvalidRequest(f"{origin}.parts: give text or parts, not both", f"{origin}.parts")
    if not (has_text or message.parts or message.tool_calls):
        raise InvalidRequest(f"{origin}.text: give text or parts", f"{origin}.text")
    role = _ROLES.get(message.role, "unspecified")
    if message.parts:
        parts = [_part(part, f"{origin}.parts[{j}]", content) for j, part in enumerate(message.parts)]
        added = conversation.add(role, parts, origin, within="parts")
    else:
        added = conversation.add(role, message.text, origin, within="text")
    if not has_text and not message.parts:
        added["content"] = None
    add_reasoning(added, message.reasoning)
    conversation.origins[f"{origin}.reasoning_content"] = f"{origin}.reasoning"
    for j, call in enumerate(message.tool_calls):
        add_call(added, call.id, call.name, call.arguments)
        conversation.origins[f"{origin}.tool_calls[{j}].function"] = f"{origin}.tool_calls[{j}]"
    if message.tool_call_id:
        added["tool_call_id"] = message.tool_call_id


@dataclass(frozen=True, slots=True)
class _Part:
    """See `translate.Part`."""

    chat: dict[str, Any]
    fields: Mapping[str, str] = field(default_factory=dict)


def _part(part: pb.Part, origin: str, content: dict[tuple[MediaKind, str], bytes]) -> _Part:
    """One part; the file in it goes into `content`."""
    if part.WhichOneof("kind") == "text":
        return _Part({"type": "text", "text": part.text})
    if part.WhichOneof("kind") == "image":
        return _media("image", part.image, origin, content)
    if part.WhichOneof("kind") == "video":
        return _media("video", part.video, origin, content)
    raise InvalidRequest(f"{origin}: set text, image or video", origin)


def _media(
    kind: MediaKind, media: pb.Image | pb.Video, origin: str, content: dict[tuple[MediaKind, str], bytes]
) -> _Part:
    source = media.WhichOneof("source")
    if source is None:
        raise InvalidRequest(f"{origin}.{kind}: set data or url", f"{origin}.{kind}")
    given = {descriptor.name: value for descriptor, value in media.ListFields() if descriptor.name not in _SOURCES}
    given["url"] = media.url
    if source == "data":
        given["url"] = f"data:,{len(content)}"  # stands for the bytes
        content[kind, given["url"]] = media.data
    fields = {f"{kind}_url": kind, f"{kind}_url.url": f"{kind}.{source}"}
    return _Part({"type": f"{kind}_url", f"{kind}_url": given}, fields)


_SOURCES = ("data", "url")


def _tool(tool: pb.Tool, index: int, conversation: Conversation, limits: ApiLimits) -> dict[str, Any]:
    conversation.origins[f"tools[{index}].function"] = f"tools[{index}]"
    if tool.builtin:
        return _builtin(tool, f"tools[{index}]", conversation)
    function: dict[str, Any] = {"name": tool.name}
    if tool.HasField("description"):
        function["description"] = tool.description
    if tool.HasField("parameters"):
        param = f"tools[{index}].parameters"
        try:
            function["parameters"] = parse_object(tool.parameters.encode(), limits)
        except InvalidRequest as e:
            raise InvalidRequest(f"{param}: not a JSON schema: {e.message}", param, e.code) from None
    return {"type": "function", "function": function}


def _builtin(tool: pb.Tool, origin: str, conversation: Conversation) -> dict[str, Any]:
    param = f"{origin}.builtin"
    if len(tool.ListFields()) > 1 or tool.builtin in ("function", "custom"):
        raise InvalidRequest(f"{param}: give the name of a tool of the server's and nothing else, or a function", param)
    conversation.origins[f"{origin}.type"] = param
    return {"type": tool.builtin}


def _tool_choice(choice: pb.ToolChoice) -> Any:
    if choice.WhichOneof("kind") == "function":
        return {"type": "function", "function": {"name": choice.function}}
    return _TOOL_MODES.get(choice.mode)
