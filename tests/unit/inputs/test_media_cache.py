from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_cluster.errors import InvalidRequest
from ernie_cluster.inputs.frames import VideoConfig
from ernie_cluster.inputs.images import ImageLimits, PixelConfig, PreparedMedia
from ernie_cluster.inputs.media_cache import MediaCache, cached, media_key
from ernie_cluster.inputs.messages import Media, Picture, PromptLimits, Settings, Video

SETTINGS = Settings(PixelConfig(), VideoConfig(), PromptLimits(), 1000)


def made_of(num_bytes: int) -> PreparedMedia:
    return PreparedMedia("image", (1, 2, 2), np.zeros(num_bytes, np.uint8), bytes(32), 1)


@given(
    st.lists(st.tuples(st.sampled_from(["get", "put"]), st.integers(0, 6), st.integers(0, 60))),
    st.integers(0, 100),
)
def test_the_least_recently_used_goes_first(steps: list[tuple[str, int, int]], max_bytes: int) -> None:
    """Against a list that is kept in order of use."""
    cache, kept = MediaCache(max_bytes), list[tuple[bytes, PreparedMedia]]()
    for verb, number, num_bytes in steps:
        key = bytes([number])
        held = next((media for k, media in kept if k == key), None)
        kept = [(k, media) for k, media in kept if k != key]
        if verb == "put":
            held = made_of(num_bytes)
            cache.put(key, held)
        else:
            assert cache.get(key) is held
        kept += [] if held is None else [(key, held)]
        while sum(media.patches.nbytes for _, media in kept) > max_bytes:
            kept.pop(0)
        assert (len(cache), cache.num_bytes) == (len(kept), sum(media.patches.nbytes for _, media in kept))
        cache.check()


class Counting:
    """A `MapMedia` that remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, settings: Settings, media: Iterable[Media]) -> list[PreparedMedia]:
        made = []
        for item in media:
            self.asked.append(item.param)
            if "broken" in item.url:
                raise InvalidRequest("broken", item.param)
            made.append(replace(made_of(10), media_hash=item.url.encode()))
        return made


def pictures(*urls: str) -> list[Media]:
    return [Picture(f"p{i}", url) for i, url in enumerate(urls)]


def test_what_was_prepared_once_is_not_prepared_again() -> None:
    inner = Counting()
    lookup = cached(MediaCache(1000), inner)
    first = list(lookup(SETTINGS, pictures("a", "b", "a")))
    assert inner.asked == ["p0", "p1"]
    second = list(lookup(SETTINGS, pictures("b", "c", "a")))
    assert inner.asked == ["p0", "p1", "p1"]
    assert [m.media_hash for m in (*first, *second)] == [b"a", b"b", b"a", b"b", b"c", b"a"]
    assert not first[0].patches.flags.writeable


def test_errors_name_the_first_and_are_not_kept() -> None:
    inner = Counting()
    lookup = cached(MediaCache(1000), inner)
    for _ in range(2):
        with pytest.raises(InvalidRequest) as caught:
            lookup(SETTINGS, pictures("a", "broken", "broken"))
        assert caught.value.param == "p1"
    assert inner.asked.count("p1") == 2


def test_whatever_changes_the_patches_changes_the_key() -> None:
    distinct: Sequence[tuple[Settings, Media]] = [
        (SETTINGS, Picture("p", "a")),
        (SETTINGS, Picture("p", "b")),
        (SETTINGS, Picture("p", "a", b"a")),
        (SETTINGS, Picture("p", "a", b"")),
        (SETTINGS, Picture("p", "a", max_pixels=1000)),
        (SETTINGS, Picture("p", "a", regions=((0, 0, 500, 500),))),
        (SETTINGS, Picture("p", "a", regions=((0, 0, 500, 500), (0, 0, 500, 500)))),
        (SETTINGS, Video("p", "a")),
        (SETTINGS, Video("p", "a", fps=2.0)),
        (SETTINGS, Video("p", "a", source_fps=2.0)),
        (SETTINGS, Video("p", "a", max_frames=2)),
        (replace(SETTINGS, pixels=PixelConfig(max_pixels=784)), Picture("p", "a")),
        (replace(SETTINGS, video=VideoConfig(fps=3)), Picture("p", "a")),
        (replace(SETTINGS, limits=PromptLimits(image=ImageLimits(max_bytes=9))), Picture("p", "a")),
        (replace(SETTINGS, max_tokens=9), Picture("p", "a")),
        (replace(SETTINGS, cache_salt=b"tenant"), Picture("p", "a")),
    ]
    assert len({media_key(*pair) for pair in distinct}) == len(distinct)


def test_where_a_picture_stands_does_not_matter() -> None:
    assert media_key(SETTINGS, Picture("p", "a")) == media_key(SETTINGS, Picture("q", "a"))
    one, other = (Picture("p", url, b"file") for url in ("http://a/", "http://b/"))
    assert media_key(SETTINGS, one) == media_key(SETTINGS, other)
