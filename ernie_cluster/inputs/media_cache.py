"""Pictures and videos that were prepared before: the same bytes under the same settings give the same patches.

What is kept is bounded in bytes, the least recently used goes first. Thread-safe.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable

from ernie_cluster.inputs.images import PreparedMedia
from ernie_cluster.inputs.messages import MapMedia, Media, Picture, Settings


class MediaCache:
    """Owns what was prepared.

    Args:
        max_bytes: of all patches together; what alone is larger is not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[bytes, PreparedMedia] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def num_bytes(self) -> int:
        """Of all patches that are kept."""
        return self._num_bytes

    def get(self, key: bytes) -> PreparedMedia | None:
        """What was put under this key, if it is still there."""
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
            return found

    def put(self, key: bytes, media: PreparedMedia) -> None:
        """Keep it, and let go of others; its patches are shared from now on and cannot be written any more."""
        media.patches.flags.writeable = False
        with self._lock:
            self._forget(key)
            self._kept[key] = media
            self._num_bytes += media.patches.nbytes
            while self._num_bytes > self._max_bytes:
                self._forget(next(iter(self._kept)))

    def check(self) -> None:
        """Assert that the books are right."""
        assert self._num_bytes == sum(m.patches.nbytes for m in self._kept.values()) <= self._max_bytes

    def _forget(self, key: bytes) -> None:
        old = self._kept.pop(key, None)
        self._num_bytes -= 0 if old is None else old.patches.nbytes


def cached(cache: MediaCache, map_media: MapMedia) -> MapMedia:
    """`map_media` with a cache before it; what comes twice in one request is prepared once."""

    def lookup(settings: Settings, media: Iterable[Media]) -> list[PreparedMedia]:
        keyed = [(media_key(settings, item), item) for item in media]
        found = {key: cache.get(key) for key, _ in keyed}
        missing = {key: item for key, item in reversed(keyed) if found[key] is None}  # errors name the first of equals
        order = [key for key in found if key in missing]
        for key, new in zip(order, map_media(settings, [missing[key] for key in order]), strict=True):
            cache.put(key, new)
            found[key] = new
        return [prepared for key, _ in keyed if (prepared := found[key]) is not None]

    return lookup


def media_key(settings: Settings, media: Media) -> bytes:
    """SHA-256 over all that the patches depend on, and whose they are; 32 bytes."""
    if isinstance(media, Picture):
        wishes: tuple[object, ...] = (media.regions, media.max_pixels)
    else:
        wishes = (media.fps, media.min_frames, media.max_frames, media.source_fps)
    is_file = media.content is not None
    digest = hashlib.sha256(repr((media.kind, wishes, is_file, settings)).encode() + b"\0")
    digest.update(media.content if media.content is not None else media.url.encode("utf-8", "surrogatepass"))
    return digest.digest()
