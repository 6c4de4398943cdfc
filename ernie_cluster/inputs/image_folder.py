"""A folder of pictures, and the names by which an index may call them: relative to it, with slashes, and never outside."""

from __future__ import annotations

import os
from pathlib import PurePath

from ernie_cluster.errors import ConfigError, InvalidRequest
from ernie_cluster.inputs.fetch import FetchRules, FileSource, read_file

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
"""Of what is taken for a picture, in any case; those of `ImageLimits.formats`."""


def is_plain(name: str) -> bool:
    """Whether a name leads down from the folder, and can be shown to people and models as it is."""
    return name.isprintable() and "\\" not in name and not {"", ".", ".."} & set(name.split("/"))


class ImageFolder:
    """Reads pictures below one folder; never through a symbolic link.

    Args:
        path: of the folder.
        max_bytes: of one picture.
    """

    def __init__(self, path: str, max_bytes: int) -> None:
        self.path = os.path.abspath(path)
        self._rules = FetchRules(folder=self.path, max_image_bytes=max_bytes)

    def names(self) -> list[str]:
        """Of all pictures below the folder, sorted; raises ConfigError when it cannot be listed."""
        found: list[str] = []
        try:
            for place, _, files in os.walk(self.path, onerror=_raise):
                below = PurePath(place).relative_to(self.path)
                found += [(below / file).as_posix() for file in files if file.lower().endswith(SUFFIXES)]
        except OSError as e:
            raise ConfigError(f"{e.filename}: cannot be listed: {e.strerror}") from None
        return sorted(found)

    def read(self, name: str) -> bytes:
        """Content of a picture.

        Args:
            name: one that `is_plain`.

        Raises:
            InvalidRequest: it is not there, no plain file, behind a link, or too large.
        """
        assert is_plain(name), f"{name!r} got in"
        try:
            return read_file(FileSource(tuple(name.split("/"))), self._rules, "image")
        except OSError:
            raise InvalidRequest("the folder itself is not there") from None


def _raise(error: OSError) -> None:
    raise error
