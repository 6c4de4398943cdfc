"""How answers are spelled as JSON: whatever writes it, clients see the same."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_cluster.api.openai import encode, sse
from ernie_cluster.request import FinishReason

texts = st.text(st.characters())  # halves of surrogate pairs, too
values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


@given(values)
def test_json_is_compact_and_spells_letters_as_they_are(value: Any) -> None:
    assert encode(value) == json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_are_exact(number: float) -> None:
    assert json.loads(encode([number])) == [number]


def test_nesting_has_no_bound() -> None:
    deep: list[Any] = []
    for _ in range(500):
        deep = [deep]
    assert encode(deep) == b"[" * 501 + b"]" * 501


def test_words_of_ours_are_texts() -> None:
    assert encode({"finish_reason": FinishReason.STOP}) == b'{"finish_reason":"stop"}'


def test_what_is_no_json_is_an_error() -> None:
    with pytest.raises(TypeError):
        encode(object())


def test_an_event() -> None:
    assert sse({"a": "ü\n"}) == 'data: {"a":"ü\\n"}\n\n'.encode()
    assert sse({}, "end") == b"event: end\ndata: {}\n\n"
