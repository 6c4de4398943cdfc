"""The folder whose pictures a model may search, as an operator configures it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ernie_cluster.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ImageSearchConfig:
    """What `image_search` finds, and how much of it a model is shown."""

    index: str
    """File that `ernie-cluster index` made of the folder, an absolute path on each node with an API replica; a new one
    counts after a restart."""
    folder: str
    """The folder itself, an absolute path on each node with an API replica; nothing outside of it is read."""
    model: str | None = None
    """Served model whose vision pool compares, for all models; None = the first that has one. The index must be made
    with it."""
    max_results: int = 4
    """Most pictures that one search finds, at least 1."""
    max_pixels: int = 200_704
    """To which a found picture is shrunk before a model sees it, at least 784."""

    def __post_init__(self) -> None:
        for name in ("index", "folder"):
            if not os.path.isabs(getattr(self, name)):
                raise ConfigError(
                    f"{name} = {getattr(self, name)!r} must be an absolute path: each API replica reads it"
                )
        for name, least in (("max_results", 1), ("max_pixels", 784)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} = {getattr(self, name)} must be at least {least}")
