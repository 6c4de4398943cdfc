"""Which of two models answers a request that leaves it open: by what is asked, and by how late the better one would be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ernie_cluster.config.auto_model import AutoModelConfig


@dataclass(frozen=True, slots=True)
class Errand:
    """What is known of a request before anything is prepared for it."""

    prompt_tokens: int
    """Of its text, about."""
    media_bytes: int
    """Of its largest picture or video, 0 without any."""
    wants_thinking: bool
    """The client asks for thought; one that says nothing does not."""
    may_overflow: bool
    """The client takes the small model where the large one would be late."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Who answers, and why."""

    model: str
    """Served name."""
    reason: str


def choose_model(errand: Errand, ttft_s: Mapping[str, float | None], config: AutoModelConfig) -> Choice:
    """Pick the model.

    Args:
        ttft_s: what the time to the first token would be, by served name; None or missing = not known, taken to be in time.
    """
    need = _need(errand, config)
    if need is None:
        return Choice(config.small, "no thought, no long prompt, no large picture")
    late_s, other_s = ttft_s.get(config.large), ttft_s.get(config.small)
    if late_s is None or late_s <= config.ttft_s:
        return Choice(config.large, need)
    late = f"{need}; {config.large} would begin after {late_s:.1f} s, later than {config.ttft_s:g} s"
    if not errand.may_overflow:
        return Choice(config.large, f"{late}, but the client asks for no smaller one")
    if other_s is not None and other_s >= late_s:
        return Choice(config.large, f"{late}, and {config.small} after {other_s:.1f} s")
    return Choice(config.small, late)


def _need(errand: Errand, config: AutoModelConfig) -> str | None:
    """Why the large model is wanted, None if it is not."""
    if errand.wants_thinking:
        return "thinking was asked for"
    if errand.prompt_tokens >= config.long_prompt_tokens:
        return f"about {errand.prompt_tokens} prompt tokens, long from {config.long_prompt_tokens} on"
    if errand.media_bytes >= config.large_media_bytes:
        return f"a picture or video of {errand.media_bytes} bytes, large from {config.large_media_bytes} on"
    return None
