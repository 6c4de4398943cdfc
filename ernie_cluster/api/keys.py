"""Whose key a request bears. Keys are compared by their SHA-256, all of them each time, in constant time."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from ernie_cluster.config.keys import ApiKey
from ernie_cluster.config.keys_file import load_keys
from ernie_cluster.errors import ConfigError

_log = logging.getLogger(__name__)

CHECK_INTERVAL_S = 1.0
"""A change of the file counts at the latest after this."""

RawHeaders = Iterable[tuple[bytes, bytes]]
"""As ASGI has them, names in lower case."""


def given_key(headers: RawHeaders) -> bytes | None:
    """The key of `Authorization: Bearer KEY`, else of `x-api-key: KEY`; None where there is neither."""
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        found.setdefault(name, value.strip())
    scheme, _, key = found.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer":
        return key.strip()
    return found.get(b"x-api-key")


def is_key(given: bytes, sha256: str) -> bool:
    """Whether the key has this hash."""
    return hmac.compare_digest(hashlib.sha256(given).hexdigest(), sha256)


def owner_of(given: bytes, keys: Iterable[ApiKey]) -> ApiKey | None:
    """The key's entry; the time taken does not tell which one, or how nearly."""
    matches = [key for key in keys if is_key(given, key.sha256)]
    return matches[0] if matches else None


class KeyRing:
    """The keys of a file, as it was when it could last be read. Owns the watch over the file.

    Args:
        path: see `load_keys`.
        clock: seconds, not running backwards.

    Raises:
        ConfigError: the file cannot be used from the start.
    """

    def __init__(self, path: str | Path, clock: Callable[[], float]) -> None:
        self._path = path
        self._clock = clock
        self._version = _version(path)
        self._keys = load_keys(path)
        self._checked_s = clock()
        self._is_checking = False

    async def keys(self) -> tuple[ApiKey, ...]:
        """The keys in force. Looks at the file first, in a thread, when that was last done a second ago."""
        now_s = self._clock()
        if now_s - self._checked_s >= CHECK_INTERVAL_S and not self._is_checking:
            self._checked_s, self._is_checking = now_s, True
            await asyncio.to_thread(self._check)
        return self._keys

    def _check(self) -> None:
        try:
            version = _version(self._path)
            if version == self._version:
                return
            self._version = version  # before reading: what is written meanwhile is seen the next time
            self._keys = load_keys(self._path)
            _log.info("%s: %d keys are in force", self._path, len(self._keys))
        except ConfigError as e:
            _log.error("%s; the keys from before stay in force", e)
        finally:
            self._is_checking = False


def _version(path: str | Path) -> tuple[int, ...] | None:
    """What changes with the file, also when another one takes its name; None where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size
