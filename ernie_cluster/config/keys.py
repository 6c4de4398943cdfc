"""API keys as values: hashes only, with what each key may use. See `keys_file` for where they are read from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ernie_cluster.errors import ConfigError

Limited = Literal["requests", "tokens", "pixels"]
"""What a key can have a limit of."""

_NAME = re.compile(r"[\w.:/@+-]{1,64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def is_sha256(value: object) -> bool:
    """Whether it is a SHA-256 digest as `ernie-cluster key` prints it."""
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One client's key."""

    name: str
    """What logs call the client: up to 64 letters, digits and `._:/@+-`."""
    sha256: str
    """SHA-256 of the key, 64 hexadecimal digits; a key is random, so no salt and no slow hash is needed."""
    requests_per_minute: int | None = None
    """At least 1; None = without limit."""
    tokens_per_minute: int | None = None
    """Prompt and answer together, at least 1; None = without limit."""
    pixels_per_minute: int | None = None
    """Of pictures and frames as the model sees them, at least 1; None = without limit."""

    @property
    def limits(self) -> Mapping[Limited, int]:
        """Those limits that there are, per minute."""
        given: dict[Limited, int | None] = {
            "requests": self.requests_per_minute,
            "tokens": self.tokens_per_minute,
            "pixels": self.pixels_per_minute,
        }
        return {what: limit for what, limit in given.items() if limit is not None}

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError("name must be 1 to 64 letters, digits and ._:/@+-")
        for what, limit in self.limits.items():
            if limit < 1:
                raise ConfigError(f"{what}_per_minute = {limit} must be at least 1; leave the key out to lock it out")
