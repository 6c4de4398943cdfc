"""The stop string filter against the definition, spelled out over the whole text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ernie_cluster.api.stops import StopStringFilter

ALPHABET = "ab🙂"
TEXTS = st.text(ALPHABET, max_size=40)
STOPS = st.lists(st.text(ALPHABET, min_size=1, max_size=6), max_size=4)


def naive(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The text before the stop string that is complete first, and which one that is."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            longest = max(hits, key=len)
            return text[: end - len(longest)], longest
    return text, None


def pieces(text: str, cuts: list[int]) -> list[str]:
    ends = sorted(min(cut, len(text)) for cut in cuts)
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


@given(TEXTS, STOPS, st.lists(st.integers(0, 40), max_size=8))
def test_any_chunking_gives_what_the_definition_says(text: str, stops: list[str], cuts: list[int]) -> None:
    search = StopStringFilter(stops)
    shown = "".join(search.push(piece) for piece in pieces(text, cuts)) + search.flush()
    assert (shown, search.matched) == naive(text, stops)


@given(TEXTS, STOPS)
def test_holds_back_exactly_what_may_become_a_stop_string(text: str, stops: list[str]) -> None:
    search = StopStringFilter(stops)
    shown = ""
    for end, char in enumerate(text, start=1):
        shown += search.push(char)
        if search.matched is not None:
            break
        may_begin = [n for stop in stops for n in range(len(stop)) if text[:end].endswith(stop[:n])]
        assert shown == text[: end - max(may_begin, default=0)]


def test_the_one_that_is_complete_first_wins() -> None:
    search = StopStringFilter(["abcd", "bc"])
    assert search.push("abcd") == "a"
    assert search.matched == "bc"


def test_nothing_passes_after_a_stop_string() -> None:
    search = StopStringFilter(["\n"])
    assert search.push("one\ntwo") == "one"
    assert search.push("three") == ""
    assert search.flush() == ""
