"""A question about pictures with its right answer: the value that training, evaluation and judging share.

Messages are OpenAI-shaped, but a picture or video stands in them as a `Picture` or `Clip`; `wire_messages` turns those
into data URLs. Knows no model and no skill.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

Language = Literal["en", "zh"]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""


@dataclass(frozen=True, slots=True)
class Thing:
    """Something to be seen in a picture."""

    name: str
    """Shape, or a single character of a text."""
    colour: str
    """"" where it has none that is asked for."""
    box: Box


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """An RGB picture and what is in it."""

    image: Image.Image
    things: tuple[Thing, ...] = ()

    def data_url(self) -> str:
        """As PNG, so that a server sees the very same pixels."""
        return "data:image/png;base64," + _base64(self.image, "PNG")


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """RGB frames of one size, `fps` of them per second."""

    frames: tuple[Image.Image, ...]
    fps: float = 2.0

    def data_url(self) -> str:
        """As JPEG frames, separated by commas."""
        return "data:video/jpeg;base64," + ",".join(_base64(frame, "JPEG") for frame in self.frames)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a function, its arguments parsed."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """A conversation that waits for the assistant, and what it should say."""

    skill: str
    language: Language
    messages: tuple[Mapping[str, Any], ...]
    """OpenAI-shaped; a content part may be {"type": "image", "image": Picture} or {"type": "video", "video": Clip}."""
    answer: str
    """The right last answer, in the words that training teaches."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """OpenAI-shaped definitions of the functions on offer."""
    tool_call: ToolCall | None = None
    """The call that should come before the answer."""
    enable_thinking: bool = False
    reasoning: str = ""
    """What training teaches to think first."""
    target: Box | None = None
    """What the answer or the call must frame: fractions of the picture's width and height, in [0, 1]."""

    @property
    def pictures(self) -> list[Picture]:
        """All pictures of the conversation, in order."""
        return [part["image"] for part in self._parts() if part["type"] == "image"]

    def wire_messages(self) -> list[dict[str, Any]]:
        """The messages as a server takes them."""
        return [{**m, "content": _wire_content(m["content"])} if "content" in m else dict(m) for m in self.messages]

    def _parts(self) -> list[Mapping[str, Any]]:
        contents = [m.get("content") for m in self.messages]
        return [part for content in contents if isinstance(content, Sequence) and not isinstance(content, str) for part in content]  # fmt: skip


def user(*parts: str | Picture | Clip) -> dict[str, Any]:
    """A user's message; text alone stays a plain string."""
    if all(isinstance(part, str) for part in parts):
        return {"role": "user", "content": "".join(map(str, parts))}
    return {"role": "user", "content": content(*parts)}


def content(*parts: str | Picture | Clip) -> list[dict[str, Any]]:
    """A message's content as parts."""
    return [_part(part) for part in parts]


def _part(part: str | Picture | Clip) -> dict[str, Any]:
    if isinstance(part, Picture):
        return {"type": "image", "image": part}
    if isinstance(part, Clip):
        return {"type": "video", "video": part}
    return {"type": "text", "text": part}


def _wire_content(value: Any) -> Any:
    return [_wire_part(part) for part in value] if isinstance(value, list) else value


def _wire_part(part: Mapping[str, Any]) -> dict[str, Any]:
    if part["type"] == "image":
        return {"type": "image_url", "image_url": {"url": part["image"].data_url()}}
    if part["type"] == "video":
        return {"type": "video_url", "video_url": {"url": part["video"].data_url()}}
    return dict(part)


def _base64(image: Image.Image, form: str) -> str:
    file = io.BytesIO()
    image.save(file, form, **({"quality": 90} if form == "JPEG" else {}))
    return base64.b64encode(file.getvalue()).decode("ascii")
