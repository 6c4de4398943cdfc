"""A name under which clients get whichever of two models suits what they ask, as an operator configures it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ernie_cluster.errors import ConfigError


@dataclass(frozen=True, slots=True)
class AutoModelConfig:
    """Which model answers what."""

    large: str
    """Served model for thought, long prompts and large pictures."""
    small: str
    """Served model for the rest; another one than `large`."""
    name: str = "ernie-auto"
    """What clients put into the field `model`; no served model has this name."""
    long_prompt_tokens: int = 8192
    """A prompt from this length on is long, by four bytes of text to a token; at least 1."""
    large_media_bytes: int = 1024 * 1024
    """A picture or video whose file has this size or more is large, at least 1."""
    ttft_s: float = 10.0
    """The large model misses its deadline when its first tokens have lately taken longer, more than 0."""
    memory_s: float = 60.0
    """For how long an answer that was seen to begin says how long the next one will take, more than 0."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.:/@+-]+", self.name):
            raise ConfigError(f"name = {self.name!r} must be letters, digits or any of . _ : / @ + -")
        if self.large == self.small:
            raise ConfigError(f"large and small are both {self.large!r}; name two served models")
        for name in ("long_prompt_tokens", "large_media_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)} must be at least 1")
        for name in ("ttft_s", "memory_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} = {value} must be greater than 0")

    def check(self, served: tuple[str, ...]) -> None:
        """Raise ConfigError unless the names fit those of the served models."""
        if self.name in served:
            raise ConfigError(f"auto_model.name = {self.name!r} is a served model, too; choose another")
        for role in ("large", "small"):
            if getattr(self, role) not in served:
                raise ConfigError(
                    f"auto_model.{role} = {getattr(self, role)!r} is not served; known: {', '.join(served)}"
                )
