"""Reads OpenAI-shaped messages: bounds them, takes the pictures out, and gives them the shape templates expect.

The API has checked the types already; here is what a type cannot say. Knows no tokens and no template.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ernie_cluster.builtin.pictures import Region
from ernie_cluster.errors import ContextTooLong, InvalidRequest
from ernie_cluster.inputs.clip import VideoLimits
from ernie_cluster.inputs.data_url import decode_base64, parse_data_url, split_data_url
from ernie_cluster.inputs.frames import VideoConfig
from ernie_cluster.inputs.images import ImageLimits, PixelConfig, PreparedMedia, prepare_image
from ernie_cluster.inputs.video import open_clip, prepare_clip
from ernie_cluster.request import MediaKind

Message = Mapping[str, Any]

_MAX_DEPTH = 64
_MAX_STEPS, _MAX_STEP = 8, 64
"""Of the path in an error: its steps, and characters of each; keys are the client's own."""


@dataclass(frozen=True, slots=True)
class PromptLimits:
    """What is accepted of one request before anything is computed."""

    image: ImageLimits = ImageLimits()
    """Of a single picture."""
    max_images: int = 32
    """Pictures per request; 0 refuses all."""
    max_prompt_chars: int = 4_000_000
    """Characters of all text together, and of the rendered prompt."""
    video: VideoLimits = VideoLimits()
    """Of a single video."""
    max_videos: int = 4
    """Videos per request; 0 refuses all."""


@dataclass(frozen=True, slots=True)
class Settings:
    """All that the preparation of a picture or video depends on."""

    pixels: PixelConfig
    video: VideoConfig
    limits: PromptLimits
    max_tokens: int
    """Tokens that one video may take; more is refused before a pixel is decoded."""
    cache_salt: bytes = b""
    """Whose media these are: what was prepared for one is not taken from a cache for another."""

    def __call__(self, media: Media) -> PreparedMedia:
        """Decode, resize and cut it; raises InvalidRequest that names the field at fault below its `param`."""
        try:
            return media.prepare(self)
        except InvalidRequest as e:
            raise type(e)(e.message, f"{media.param}.{e.param or 'url'}", e.code) from None
        except MemoryError:
            raise InvalidRequest(
                f"the {media.kind} takes more memory to decode than there is for one; send a smaller one",
                f"{media.param}.url",
                f"{media.kind}_too_large",
            ) from None


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of the messages, not yet decoded."""

    param: str
    """Where it stands, in the client's spelling."""
    url: str
    """A data URL, unless there is `content`."""
    content: bytes | None = None
    """The file, where the API has fetched it."""
    regions: tuple[Region, ...] = ()
    """What is to be seen of it, where a tool has zoomed in: the region of its region, and so on."""
    max_pixels: int | None = None
    """To which it is shrunk, where a tool has found it; None = to what the model takes."""
    kind: ClassVar[MediaKind] = "image"

    def prepare(self, settings: Settings) -> PreparedMedia:
        """See `Settings.__call__`, but errors name fields below `param` only."""
        limits, data = settings.limits.image, self.content
        if data is None:
            mime, data = parse_data_url(self.url, max_bytes=limits.max_bytes)
            if not mime.startswith("image/"):
                raise InvalidRequest(f"the data URL is of type {mime}; send an image", code="invalid_image")
        return prepare_image(data, settings.pixels.at_most(self.max_pixels), limits, self.regions)

    @classmethod
    def of(cls, given: Message, param: str) -> Picture:
        """Of an `image_url` of messages.

        Args:
            given: `url`, and maybe `content`, `regions` and `max_pixels`.
            param: where it stands.
        """
        return cls(param, given["url"], given.get("content"), given.get("regions", ()), given.get("max_pixels"))


@dataclass(frozen=True, slots=True)
class Video:
    """A video of the messages, not yet decoded."""

    param: str
    """Where it stands, in the client's spelling."""
    url: str
    """A data URL, unless there is `content`; a list of frames is separated by commas."""
    fps: float | None = None
    """Frames per second that the model is to see."""
    min_frames: int | None = None
    max_frames: int | None = None
    source_fps: float | None = None
    """Rate at which the frames of a list were taken."""
    content: bytes | None = None
    """The file, where the API has fetched it."""
    kind: ClassVar[MediaKind] = "video"

    def prepare(self, settings: Settings) -> PreparedMedia:
        """See `Settings.__call__`, but errors name fields below `param` only."""
        limits = settings.limits.video
        config = settings.video.with_wishes(self.fps, self.min_frames, self.max_frames)
        if self.content is not None:
            clip = open_clip(None, [self.content], limits, self.source_fps)
        else:
            mime, encoded = split_data_url(self.url, "video", limits.max_bytes)
            pieces = [decode_base64(piece, "video") for piece in encoded.split(",")] if encoded else []
            clip = open_clip(mime, pieces, limits, self.source_fps)
        return prepare_clip(clip, settings.pixels, config, max_tokens=settings.max_tokens)


Media = Picture | Video

MapMedia = Callable[[Settings, Iterable[Media]], Iterable[PreparedMedia]]
"""Applies the settings, a function, to pictures and videos and keeps their order: the builtin `map`, a thread pool's,
or one that goes to other processes or to a cache first."""


def read_messages(
    messages: Sequence[Message], limits: PromptLimits, *, part_types: Mapping[MediaKind, str], model: str
) -> tuple[list[Message], list[Media]]:
    """The messages as templates expect them, and their pictures and videos in order.

    Content None becomes "", the arguments of tool calls become objects, and the part of a picture or video keeps its
    type only.

    Args:
        messages: `content` is a string, None, or a list of `text`, `image_url` and `video_url` parts.
        limits: see there.
        part_types: type that the template expects of a picture's and a video's part; empty for models that read text
            only.
        model: served name, for errors.

    Raises:
        InvalidRequest: no messages, an unserved kind of part, too many pictures or videos, or text that is not Unicode.
        ContextTooLong: too many characters.
    """
    if not messages:
        raise InvalidRequest("there are no messages; send at least one", "messages")
    media: list[Media] = []
    rendered: list[Message] = []
    for i, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            content = [
                _read_part(part, f"messages[{i}].content[{j}]", part_types, media, model)
                for j, part in enumerate(content)
            ]
        rendered.append({**message, "content": "" if content is None else content, **_tool_calls(message)})
    _check_count([m for m in media if isinstance(m, Picture)], limits.max_images, "pictures")
    _check_count([m for m in media if isinstance(m, Video)], limits.max_videos, "videos")
    check_text(rendered, "messages", limits.max_prompt_chars)
    return rendered, media


def check_text(value: object, param: str, max_chars: int) -> int:
    """Characters in all strings of `value`, however nested.

    Raises:
        InvalidRequest: a string with half of a surrogate pair, or nesting beyond 64 levels; `param` leads to it.
        ContextTooLong: more than `max_chars`.
    """
    path: list[int | str] = []
    try:
        return _num_chars(value, max_chars, path)
    except InvalidRequest as e:
        where = "".join(f"[{step}]" if isinstance(step, int) else f".{step[:_MAX_STEP]}" for step in path[:_MAX_STEPS])
        raise type(e)(e.message, param + where, e.code) from None


def _num_chars(value: object, max_chars: int, path: list[int | str]) -> int:
    """As `check_text`; on an error `path` leads to its place. It is spelled out only there: keys may be megabytes."""
    if len(path) > _MAX_DEPTH:
        raise InvalidRequest(f"nested deeper than {_MAX_DEPTH} levels; flatten it")
    if isinstance(value, str):
        num_chars = _encodable(value)
    elif isinstance(value, Mapping):
        num_chars = 0
        for key, inner in value.items():
            num_chars += _encodable(str(key))
            path.append(str(key))
            num_chars += _num_chars(inner, max_chars, path)
            path.pop()
    elif isinstance(value, (list, tuple)):
        num_chars = 0
        for i, inner in enumerate(value):
            path.append(i)
            num_chars += _num_chars(inner, max_chars, path)
            path.pop()
    else:
        return 0
    if num_chars > max_chars:
        raise ContextTooLong(f"{num_chars} characters exceed the limit of {max_chars}; shorten the text")
    return num_chars


def _encodable(text: str) -> int:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise InvalidRequest(f"character {e.start} is half of a surrogate pair; send valid Unicode") from None
    return len(text)


def _check_count(media: Sequence[Media], limit: int, what: str) -> None:
    if len(media) > limit:
        raise InvalidRequest(
            f"{len(media)} {what}, the limit is {limit} per request; send fewer", f"{media[limit].param}.url"
        )


def _read_part(
    part: Message, param: str, part_types: Mapping[MediaKind, str], media: list[Media], model: str
) -> Message:
    kind = part.get("type")
    if kind == "text":
        return part
    if kind not in ("image_url", "video_url"):
        raise InvalidRequest(
            f"parts of type {kind!r} are not served; send text, image_url or video_url", f"{param}.type"
        )
    if not part_types:
        raise InvalidRequest(f"{model} reads text only; leave pictures and videos out", param)
    given = part[kind]
    if kind == "image_url":
        media.append(Picture.of(given, f"{param}.{kind}"))
        return {"type": part_types["image"]}
    wishes = (given.get(name) for name in ("fps", "min_frames", "max_frames", "source_fps", "content"))
    media.append(Video(f"{param}.{kind}", given["url"], *wishes))
    return {"type": part_types["video"]}


def _tool_calls(message: Message) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not calls:
        return {}
    return {"tool_calls": [{**call, "function": _with_parsed_arguments(call.get("function") or {})} for call in calls]}


def _with_parsed_arguments(function: Message) -> dict[str, Any]:
    """OpenAI sends arguments as JSON text, templates print objects. Broken JSON of a model stays as it is."""
    arguments = function.get("arguments") or "{}"
    try:
        return {**function, "arguments": json.loads(arguments) if isinstance(arguments, str) else arguments}
    except (ValueError, RecursionError):
        return dict(function)
