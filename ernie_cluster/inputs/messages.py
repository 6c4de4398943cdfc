"""Reads OpenAI-shaped messages: bounds them, takes the pictures out, and gives them the shape templates expect.

The API has checked the types already; here is what a type cannot say. Knows no tokens and no template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ernie_cluster.errors import ContextTooLong, InvalidRequest
from ernie_cluster.inputs.images import ImageLimits, PixelConfig, PreparedMedia, parse_data_url, prepare_image

Message = Mapping[str, Any]

_MAX_DEPTH = 64


@dataclass(frozen=True, slots=True)
class PromptLimits:
    """What is accepted of one request before anything is computed."""

    image: ImageLimits = ImageLimits()
    """Of a single picture."""
    max_images: int = 32
    """Pictures per request; 0 refuses all."""
    max_prompt_chars: int = 4_000_000
    """Characters of all text together, and of the rendered prompt."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of the messages, not yet decoded."""

    param: str
    """Where it stands, in the client's spelling."""
    url: str
    """A data URL."""

    def prepare(self, pixels: PixelConfig, limits: ImageLimits) -> PreparedMedia:
        """Decode, resize and cut it; raises InvalidRequest that names `param`."""
        try:
            mime, data = parse_data_url(self.url, max_bytes=limits.max_bytes)
            if not mime.startswith("image/"):
                raise InvalidRequest(f"the data URL is of type {mime}; send an image", code="invalid_image")
            return prepare_image(data, pixels, limits)
        except InvalidRequest as e:
            raise InvalidRequest(e.message, self.param, e.code) from None


def read_messages(
    messages: Sequence[Message], limits: PromptLimits, *, image_part_type: str | None
) -> tuple[list[Message], list[Picture]]:
    """The messages as templates expect them, and their pictures in order.

    Content None becomes "", the arguments of tool calls become objects, and a picture's part keeps its type only.

    Args:
        messages: `content` is a string, None, or a list of `text` and `image_url` parts.
        limits: see there.
        image_part_type: type that the template expects of a picture's part; None for models that read text only.

    Raises:
        InvalidRequest: no messages, an unserved kind of part, too many pictures, or text that is not Unicode.
        ContextTooLong: too many characters.
    """
    if not messages:
        raise InvalidRequest("there are no messages; send at least one", "messages")
    pictures: list[Picture] = []
    rendered: list[Message] = []
    for i, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            content = [
                _read_part(part, f"messages[{i}].content[{j}]", image_part_type, pictures)
                for j, part in enumerate(content)
            ]
        rendered.append({**message, "content": "" if content is None else content, **_tool_calls(message)})
    if len(pictures) > limits.max_images:
        raise InvalidRequest(
            f"{len(pictures)} pictures, the limit is {limits.max_images} per request; send fewer",
            pictures[limits.max_images].param,
        )
    check_text(rendered, "messages", limits.max_prompt_chars)
    return rendered, pictures


def check_text(value: object, param: str, max_chars: int, depth: int = 0) -> int:
    """Characters in all strings of `value`, however nested.

    Raises:
        InvalidRequest: a string with half of a surrogate pair, or nesting beyond 64 levels; `param` leads to it.
        ContextTooLong: more than `max_chars`.
    """
    if depth > _MAX_DEPTH:
        raise InvalidRequest(f"nested deeper than {_MAX_DEPTH} levels; flatten it", param)
    if isinstance(value, str):
        num_chars = _num_chars(value, param)
    elif isinstance(value, Mapping):
        num_chars = sum(
            _num_chars(str(key), param) + check_text(inner, f"{param}.{key}", max_chars, depth + 1)
            for key, inner in value.items()
        )
    elif isinstance(value, (list, tuple)):
        num_chars = sum(check_text(inner, f"{param}[{i}]", max_chars, depth + 1) for i, inner in enumerate(value))
    else:
        return 0
    if num_chars > max_chars:
        raise ContextTooLong(f"{num_chars} characters exceed the limit of {max_chars}; shorten the text", param)
    return num_chars


def _num_chars(text: str, param: str) -> int:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise InvalidRequest(f"character {e.start} is half of a surrogate pair; send valid Unicode", param) from None
    return len(text)


def _read_part(part: Message, param: str, image_part_type: str | None, pictures: list[Picture]) -> Message:
    kind = part.get("type")
    if kind == "text":
        return part
    if kind != "image_url":
        raise InvalidRequest(f"parts of type {kind!r} are not served; send text or image_url", f"{param}.type")
    if image_part_type is None:
        raise InvalidRequest("this model reads text only; leave the picture out", param)
    pictures.append(Picture(f"{param}.image_url.url", part["image_url"]["url"]))
    return {"type": image_part_type}


def _tool_calls(message: Message) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not calls:
        return {}
    return {"tool_calls": [{**call, "function": _with_parsed_arguments(call.get("function") or {})} for call in calls]}


def _with_parsed_arguments(function: Message) -> dict[str, Any]:
    """OpenAI sends arguments as JSON text, templates print objects. Broken JSON of a model stays as it is."""
    arguments = function.get("arguments")
    try:
        return {**function, "arguments": json.loads(arguments) if isinstance(arguments, str) else arguments}
    except (ValueError, RecursionError):
        return dict(function)
