"""The items of a conversation in OpenAI's Responses API: messages with their parts, thoughts, calls and results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from ernie_cluster.api.schemas import Count, MediaUrl, Rate
from ernie_cluster.api.validate import Strict, Unread, list_tag, type_tag


class TextPart(Strict):
    """Words; which of the types, depends on who says them."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: Unread = None
    logprobs: Unread = None
    fields: ClassVar[Mapping[str, str]] = {}

    @property
    def chat(self) -> dict[str, Any]:
        return {"type": "text", "text": self.text}


class ImagePart(Strict):
    """A picture."""

    type: Literal["input_image"]
    image_url: MediaUrl
    fields: ClassVar[Mapping[str, str]] = {"image_url.url": "image_url"}

    @property
    def chat(self) -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": self.image_url}}


class VideoPart(Strict):
    """A video: ours, OpenAI has none. Beside the URL stand the fields of chat's `video_url`."""

    type: Literal["input_video"]
    video_url: MediaUrl
    fps: Rate | None = None
    min_frames: Count | None = None
    max_frames: Count | None = None
    source_fps: Rate | None = None
    fields: ClassVar[Mapping[str, str]] = {
        "video_url.url": "video_url",
        **{f"video_url.{name}": name for name in ("fps", "min_frames", "max_frames", "source_fps")},
    }

    @property
    def chat(self) -> dict[str, Any]:
        wishes = self.model_dump(exclude_none=True, exclude={"type", "video_url"})
        return {"type": "video_url", "video_url": {"url": self.video_url, **wishes}}


InputPart = Annotated[
    Annotated[TextPart, Tag("<input_text>")]
    | Annotated[TextPart, Tag("<output_text>")]
    | Annotated[ImagePart, Tag("<input_image>")]
    | Annotated[VideoPart, Tag("<input_video>")],
    Discriminator(
        type_tag,
        custom_error_type="part_type",
        custom_error_message="a part must be an object whose type is input_text, input_image or input_video",
    ),
]
Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[InputPart], Field(min_length=1, fail_fast=True), Tag("<list>")],
    Discriminator(list_tag),
]


class SentItem(Strict):
    """What all items have in common, whoever made them."""

    id: Unread = None
    status: Unread = None


class InputMessage(SentItem):
    """What a user or the application says."""

    type: Literal["message"] = "message"
    role: Literal["user", "system", "developer"]
    content: Content


class AssistantMessage(SentItem):
    """What the model said."""

    type: Literal["message"] = "message"
    role: Literal["assistant"]
    content: Annotated[
        Annotated[str, Tag("<text>")] | Annotated[list[TextPart], Field(fail_fast=True), Tag("<list>")],
        Discriminator(list_tag),
    ]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ReasoningText(Strict):
    """A piece of a thought, or of its summary."""

    type: Unread = None
    text: str


class ReasoningItem(SentItem):
    """What the model thought."""

    type: Literal["reasoning"]
    summary: Annotated[list[ReasoningText], Field(fail_fast=True)] | None = None
    content: Annotated[list[ReasoningText], Field(fail_fast=True)] | None = None
    """Counts before the summary."""
    encrypted_content: Unread = None

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.content or self.summary or ())


class CallItem(SentItem):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class ResultItem(SentItem):
    """What a tool answered."""

    type: Literal["function_call_output"]
    call_id: str
    output: Content


def _item_tag(item: Any) -> str:
    if isinstance(item, dict) and item.get("type", "message") == "message":
        return "<assistant>" if item.get("role") == "assistant" else "<message>"
    return type_tag(item)


Item = Annotated[
    Annotated[InputMessage, Tag("<message>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")]
    | Annotated[CallItem, Tag("<function_call>")]
    | Annotated[ResultItem, Tag("<function_call_output>")],
    Discriminator(
        _item_tag,
        custom_error_type="item_type",
        custom_error_message="an item must be an object whose type is message, reasoning, function_call or "
        "function_call_output; an item_reference finds nothing, for nothing is stored here: send the item itself",
    ),
]
