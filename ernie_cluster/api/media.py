"""Pictures and videos that a chat names by URL: which they are, and how what was fetched takes its place in the chat."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ernie_cluster.api.schemas import ChatBody, GenerationBody, ImagePart, VideoPart
from ernie_cluster.request import MediaKind


@dataclass(frozen=True, slots=True)
class Wanted:
    """A picture or video that a request names by URL."""

    param: str
    """Where it stands, in the client's spelling."""
    kind: MediaKind
    url: str


Fetched = Mapping[tuple[MediaKind, str], bytes]
"""Content by kind and URL."""


def wanted_media(body: GenerationBody) -> list[Wanted]:
    """All that a body names by URL, in order; data URLs are not among them."""
    return [] if not isinstance(body, ChatBody) else list(_wanted(body))


def _wanted(body: ChatBody) -> Iterator[Wanted]:
    for i, message in enumerate(body.messages):
        for j, part in enumerate(message.content if isinstance(message.content, list) else ()):
            where = f"messages[{i}].content[{j}]"
            if isinstance(part, ImagePart) and not is_inline(part.image_url.url):
                yield Wanted(f"{where}.image_url.url", "image", part.image_url.url)
            elif isinstance(part, VideoPart) and not is_inline(part.video_url.url):
                yield Wanted(f"{where}.video_url.url", "video", part.video_url.url)


def has_media(body: GenerationBody) -> bool:
    """Whether a body brings or names pictures or videos."""
    return isinstance(body, ChatBody) and any(
        isinstance(part, ImagePart | VideoPart)
        for message in body.messages
        for part in (message.content if isinstance(message.content, list) else ())
    )


def attach(messages: list[dict[str, Any]], fetched: Fetched) -> list[dict[str, Any]]:
    """The messages, in which what was fetched stands as `content` beside its URL; changed in place."""
    kinds: tuple[MediaKind, ...] = ("image", "video")
    for message in messages if fetched else ():
        for part in message["content"] if isinstance(message.get("content"), list) else ():
            for kind in kinds:
                given = part.get(f"{kind}_url")
                if given is not None and (kind, given["url"]) in fetched:
                    given["content"] = fetched[kind, given["url"]]
    return messages


def is_inline(url: str) -> bool:
    """Whether a URL holds what it names."""
    return url[:5].lower() == "data:"
