"""The messages of a conversation in Anthropic's Messages API, and the blocks that they are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from ernie_cluster.api.schemas import MediaUrl
from ernie_cluster.api.validate import Strict, Unread, list_tag, type_tag


class TextBlock(Strict):
    """Words."""

    type: Literal["text"]
    text: str
    citations: Unread = None
    fields: ClassVar[Mapping[str, str]] = {}

    @property
    def chat(self) -> dict[str, Any]:
        return {"type": "text", "text": self.text}


class Base64Source(Strict):
    """A picture's file."""

    type: Literal["base64"]
    media_type: Annotated[str, Field(pattern="^image/[A-Za-z0-9_.+-]+$")]
    data: str
    field: ClassVar[str] = "data"

    @property
    def as_url(self) -> str:
        return f"data:{self.media_type};base64,{self.data}"


class UrlSource(Strict):
    """Where a picture's file is to be fetched."""

    type: Literal["url"]
    url: MediaUrl
    field: ClassVar[str] = "url"

    @property
    def as_url(self) -> str:
        return self.url


class ImageBlock(Strict):
    """A picture."""

    type: Literal["image"]
    source: Annotated[
        Annotated[Base64Source, Tag("<base64>")] | Annotated[UrlSource, Tag("<url>")],
        Discriminator(
            type_tag,
            custom_error_type="source_type",
            custom_error_message="a source must be an object whose type is base64 or url",
        ),
    ]

    @property
    def fields(self) -> Mapping[str, str]:
        return {"image_url.url": f"source.{self.source.field}"}

    @property
    def chat(self) -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": self.source.as_url}}


ShownBlock = Annotated[
    Annotated[TextBlock, Tag("<text>")] | Annotated[ImageBlock, Tag("<image>")],
    Discriminator(
        type_tag,
        custom_error_type="block_type",
        custom_error_message="a block here must be an object whose type is text or image",
    ),
]


class ResultBlock(Strict):
    """What a tool answered."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: (
        Annotated[
            Annotated[str, Tag("<text>")] | Annotated[list[ShownBlock], Field(fail_fast=True), Tag("<list>")],
            Discriminator(list_tag),
        ]
        | None
    ) = None


UserBlock = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ImageBlock, Tag("<image>")]
    | Annotated[ResultBlock, Tag("<tool_result>")],
    Discriminator(
        type_tag,
        custom_error_type="block_type",
        custom_error_message="a user's block must be an object whose type is text, image or tool_result",
    ),
]


class ThinkingBlock(Strict):
    """What the model thought."""

    type: Literal["thinking"]
    thinking: str
    signature: Unread = None


class RedactedBlock(Strict):
    """A thought of another model that nobody here can read."""

    type: Literal["redacted_thinking"]


class ToolUseBlock(Strict):
    """A call that the model made."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


AssistantBlock = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ThinkingBlock, Tag("<thinking>")]
    | Annotated[RedactedBlock, Tag("<redacted_thinking>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")],
    Discriminator(
        type_tag,
        custom_error_type="block_type",
        custom_error_message="an assistant's block must be an object whose type is text, thinking or tool_use",
    ),
]


class UserMessage(Strict):
    """What a user says, and what tools answered."""

    role: Literal["user"]
    content: Annotated[
        Annotated[str, Tag("<text>")] | Annotated[list[UserBlock], Field(min_length=1, fail_fast=True), Tag("<list>")],
        Discriminator(list_tag),
    ]

    def runs(self) -> Iterator[tuple[int, ResultBlock | list[TextBlock | ImageBlock]]]:
        """(index of its first block, a tool's result or a run of other blocks), of content that is a list."""
        run: list[TextBlock | ImageBlock] = []
        for i, block in enumerate(self.content):
            if isinstance(block, ResultBlock):
                if run:
                    yield i - len(run), run
                    run = []
                yield i, block
            else:
                assert not isinstance(block, str)
                run.append(block)
        if run:
            yield len(self.content) - len(run), run


class AssistantMessage(Strict):
    """What the model said."""

    role: Literal["assistant"]
    content: Annotated[
        Annotated[str, Tag("<text>")] | Annotated[list[AssistantBlock], Field(fail_fast=True), Tag("<list>")],
        Discriminator(list_tag),
    ]


class SystemMessage(Strict):
    """What the application says."""

    role: Literal["system"]
    content: Annotated[
        Annotated[str, Tag("<text>")] | Annotated[list[TextBlock], Field(fail_fast=True), Tag("<list>")],
        Discriminator(list_tag),
    ]


Message = Annotated[
    Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[SystemMessage, Tag("<system>")],
    Discriminator(
        lambda message: f"<{message.get('role') if isinstance(message, dict) else None}>",
        custom_error_type="role",
        custom_error_message="a message must be an object whose role is user, assistant or system",
    ),
]


def joined(content: str | Sequence[TextBlock]) -> str:
    """Text of the application; templates do not expect parts there."""
    return content if isinstance(content, str) else "\n".join(block.text for block in content)
