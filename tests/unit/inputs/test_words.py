from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors

from ernie_cluster.cli.tiny_tokenizer import train_tokenizer
from ernie_cluster.inputs import words
from ernie_cluster.inputs.words import WordEncoder, word_pattern

BYTE_LEVEL = train_tokenizer(2048)
ALPHABET = ["▁", "\n", "a", "b", ".", "1"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece(
    merges: list[tuple[int, int]], *, all_bytes: bool = True, fuse_unk: bool = True, normalize: bool = False
) -> tokenizers.Tokenizer:
    """As such models are converted; merges are pairs of indices into what there is by then, modulo its number."""
    pieces = list(ALPHABET)
    pairs = []
    for i, j in merges:
        left, right = pieces[i % len(pieces)], pieces[j % len(pieces)]
        if left + right not in pieces:
            pairs.append((left, right))
            pieces.append(left + right)
    vocab = {text: i for i, text in enumerate(["<unk>", *(BYTES if all_bytes else ()), *pieces])}
    options = {"unk_token": "<unk>", "fuse_unk": fuse_unk, "byte_fallback": all_bytes}
    backend = tokenizers.Tokenizer(models.BPE(vocab, pairs, **options))
    if normalize:
        backend.normalizer = normalizers.Replace(" ", "▁")
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=False)
    backend.add_special_tokens(["<s>"])
    backend.add_tokens([AddedToken("b1", normalized=True), AddedToken("1", normalized=True)])
    return backend


def pattern_of(backend: tokenizers.Tokenizer) -> re.Pattern[str] | None:
    return word_pattern(json.loads(backend.to_str()))


def ids_of(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    return list(backend.encode(text, add_special_tokens=False).ids)


letters = st.sampled_from([*" \n\t\r\u00a0\u3000\x1c▁ab.1xé好😀'", "  ", " a", "a ", "<s>", "'s", "<0x0A>"])
texts = st.lists(letters, max_size=40).map("".join)
ENCODER = WordEncoder(BYTE_LEVEL, pattern_of(BYTE_LEVEL))


@settings(max_examples=400)
@given(st.one_of(texts, st.text(st.characters(exclude_categories=["Cs"]))))
def test_byte_level_ids_are_the_library_s(text: str) -> None:
    assert ENCODER.encode(text) == ids_of(BYTE_LEVEL, text)


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=12),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.lists(texts, min_size=1, max_size=8),
)
def test_ids_are_the_library_s_whatever_the_merges(
    merges: list[tuple[int, int]], all_bytes: bool, fuse_unk: bool, normalize: bool, some_texts: list[str]
) -> None:
    """Some of these merges tie letters to the white space behind them; there no text may be cut."""
    backend = sentencepiece(merges, all_bytes=all_bytes, fuse_unk=fuse_unk, normalize=normalize)
    pattern = pattern_of(backend)
    assert pattern is not None
    encoder = WordEncoder(backend, pattern)
    for text in [*some_texts, *some_texts]:
        assert encoder.encode(text) == ids_of(backend, text)


def test_words_are_cut_before_spaces_and_lines() -> None:
    pattern = pattern_of(BYTE_LEVEL)
    assert pattern is not None
    text = "<s>one two\n\n  three\tfour \n five.  "
    assert pattern.findall(text) == ["<s>one", " two", "\n\n  three\tfour", " \n five.", "  "]


def test_a_letter_that_a_merge_ties_to_white_space_ends_no_word() -> None:
    dot, space = ALPHABET.index("."), ALPHABET.index("▁")
    pattern = pattern_of(sentencepiece([(dot, space)]))
    assert pattern is not None
    assert pattern.findall("a. b a▁ b ▁a") == ["a. b", " a▁ b", " ▁a"]


class Counting:
    """A tokenizer of the library that tells what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, text: str, *, add_special_tokens: bool) -> tokenizers.Encoding:
        self.asked.append(text)
        return BYTE_LEVEL.encode(text, add_special_tokens=add_special_tokens)


def test_new_words_are_encoded_together_and_once() -> None:
    backend = Counting()
    encoder = WordEncoder(backend, pattern_of(BYTE_LEVEL))  # type: ignore[arg-type]
    for text in ("a few new words, a few", "a few more words, few "):
        assert encoder.encode(text) == ids_of(BYTE_LEVEL, text)
    assert backend.asked == ["a", " few new words, a", " ", " more"]


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_MAX_WORDS", 10)
    backend = Counting()
    encoder = WordEncoder(backend, pattern_of(BYTE_LEVEL))  # type: ignore[arg-type]
    for i in range(100):
        encoder.encode(f"{i} {'long' * 20} {'好😀' * 10}")
        assert len(encoder._known) <= 10
    assert all(len(word) <= 32 and len(ids) <= 16 for word, ids in encoder._known.items())


def _with(**parts: Any) -> Callable[[tokenizers.Tokenizer], None]:
    def change(backend: tokenizers.Tokenizer) -> None:
        for name, part in parts.items():
            setattr(backend, name, part)

    return change


ODD_ONES: dict[str, Callable[[tokenizers.Tokenizer], Any]] = {
    "normalizer": _with(normalizer=normalizers.NFKC()),
    "prepend": _with(normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])),
    "dummy prefix": _with(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="always")),
    "prefix": _with(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "bytes unsplit": _with(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
    "other split": _with(
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.Split("\n", "merged_with_previous"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    ),
    "nothing": _with(pre_tokenizer=None),
    "word pieces": _with(model=models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]")),
    "whole words": _with(model=models.BPE({"a": 0}, [], ignore_merges=True)),
    "word ends": _with(model=models.BPE({"a": 0}, [], end_of_word_suffix="</w>")),
    "truncation": lambda backend: backend.enable_truncation(5),
    "padding": lambda backend: backend.enable_padding(length=5),
    "twice": _with(post_processor=processors.TemplateProcessing(single="$A $A", special_tokens=[])),
    "token with a space": lambda backend: backend.add_tokens(["a b"]),
    "token that strips": lambda backend: backend.add_tokens([AddedToken("<x>", rstrip=True)]),
}


@pytest.mark.parametrize("name", ODD_ONES)
def test_texts_of_other_tokenizers_stay_whole(name: str) -> None:
    backend = tokenizers.Tokenizer.from_str(BYTE_LEVEL.to_str())
    ODD_ONES[name](backend)
    assert pattern_of(backend) is None
    text = "a b\n a <x>  b"
    assert WordEncoder(backend, None).encode(text) == ids_of(backend, text)


def test_without_a_piece_for_a_space_texts_stay_whole() -> None:
    backend = tokenizers.Tokenizer(models.BPE({"<unk>": 0, "a": 1, "\n": 2}, [], unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    assert pattern_of(backend) is None
    assert ids_of(backend, "x y") == [0]
