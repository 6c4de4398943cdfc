"""A name that stands for several served models: what is told of a request to whoever chooses."""

from __future__ import annotations

from typing import Any, Protocol

from ernie_cluster.api.media import Fetched
from ernie_cluster.api.schemas import ChatBody, CompletionBody, GenerationBody, ImagePart, VideoPart

BYTES_PER_TOKEN = 4
"""Of text in UTF-8, about: four letters, or one and a third Chinese characters."""


class Alias(Protocol):
    """Chooses the model of requests that name it."""

    @property
    def name(self) -> str:
        """What clients put into the field `model`."""
        ...

    @property
    def models(self) -> tuple[str, ...]:
        """Served names that it may choose, the most able first."""
        ...

    def choose(
        self, *, prompt_tokens: int, media_bytes: int, wants_thinking: bool, may_overflow: bool
    ) -> tuple[str, str]:
        """(served name, why); see `policy.choice.Errand`."""
        ...

    def saw(self, model: str, ttft_s: float) -> None:
        """An answer of a served model began, so long after its request came."""
        ...


def errand_of(body: GenerationBody, fetched: Fetched) -> dict[str, Any]:
    """Arguments of `Alias.choose` for a request.

    Args:
        fetched: what the body names by URL.
    """
    return {
        "prompt_tokens": _prompt_tokens(body),
        "media_bytes": max([_inline_bytes(body), *map(len, fetched.values())]),
        "wants_thinking": isinstance(body, ChatBody) and bool(body.thinking),
        "may_overflow": bool(body.allow_smaller_model),
    }


def _prompt_tokens(body: GenerationBody) -> int:
    if isinstance(body, ChatBody):
        return sum(_text_bytes(m.content) for m in body.messages) // BYTES_PER_TOKEN
    assert isinstance(body, CompletionBody)
    prompts = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if prompts and isinstance(prompts[0], int):
        return len(prompts)
    return max((len(p.encode()) // BYTES_PER_TOKEN if isinstance(p, str) else _length(p) for p in prompts), default=0)


def _length(prompt: Any) -> int:
    """Of one of several prompts of ids, which nobody has checked yet."""
    return len(prompt) if isinstance(prompt, list) else 0


def _text_bytes(content: Any) -> int:
    if isinstance(content, str):
        return len(content.encode(errors="replace"))
    return sum(len(p.text.encode(errors="replace")) for p in content or () if hasattr(p, "text"))


def _inline_bytes(body: GenerationBody) -> int:
    """Of the largest file inside a URL; base64 takes four letters for three bytes."""
    urls = [
        part.image_url.url if isinstance(part, ImagePart) else part.video_url.url
        for message in (body.messages if isinstance(body, ChatBody) else ())
        for part in (message.content if isinstance(message.content, list) else ())
        if isinstance(part, ImagePart | VideoPart)
    ]
    return max((len(url) * 3 // 4 for url in urls if url[:5].lower() == "data:"), default=0)
