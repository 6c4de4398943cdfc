"""Token ids of a text, word by word: words come again, and a word whose ids are known costs a look into a dict.

A text is cut where a space or line break follows a letter. That is done only with tokenizers whose ids cannot depend
on what lies beyond such a cut, which `word_pattern` reads off their description; to all others a text is one piece.
Knows no control tokens: their spellings hold no white space, so that each lies within a word. All clients share what is
remembered; that tells them no more of each other than the library's own memory of words does.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import tokenizers

_MAX_WORDS, _MAX_CHARS, _MAX_IDS = 32_768, 32, 16
"""Words that are remembered, and characters and ids of each: 10 MB as a rule, 30 MB at worst."""

_SPACE_MARK = "▁"
"""SentencePiece's letter for a space."""
_PIECES_OF_LINES = {"type": "Split", "behavior": "Isolated", "invert": False}
_LINE_BREAKS: tuple[Any, ...] = ({"Regex": r"\n"}, {"String": "\n"})
_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")


class WordEncoder:
    """Encodes texts with a tokenizer of the library; safe to share between threads.

    Args:
        backend: the tokenizer.
        words: see `word_pattern`.
    """

    def __init__(self, backend: tokenizers.Tokenizer, words: re.Pattern[str] | None) -> None:
        self._backend = backend
        self._words = words
        self._known: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str) -> list[int]:
        """The same ids as the library's; nothing is added in front or behind."""
        words = [] if self._words is None else self._words.findall(text)
        if len(words) < 2:
            return list(self._encode(text).ids)
        known = self._known
        found = [known.get(word) for word in words]
        learned = self._learn([word for word, ids in zip(words, found, strict=True) if ids is None])
        return [i for word, ids in zip(words, found, strict=True) for i in (learned[word] if ids is None else ids)]

    def _encode(self, text: str) -> tokenizers.Encoding:
        return self._backend.encode(text, add_special_tokens=False)

    def _learn(self, words: Sequence[str]) -> dict[str, Sequence[int]]:
        """Ids of each, which are remembered. All that may follow each other go as one text: alone, a word costs twice as
        much; white space must be in front of each, and behind none."""
        learned: dict[str, Sequence[int]] = {}
        joined: list[str] = []
        for word in dict.fromkeys(words):
            if word[0] in " \n" and not word[-1].isspace():
                joined.append(word)
            else:
                learned[word] = self._encode(word).ids
        if joined:
            learned |= zip(joined, self._split("".join(joined), joined), strict=True)
        for word, ids in learned.items():
            if len(word) <= _MAX_CHARS and len(ids) <= _MAX_IDS:
                if len(self._known) >= _MAX_WORDS:
                    self._known.clear()
                self._known[word] = tuple(ids)
        return learned

    def _split(self, text: str, words: Iterable[str]) -> Iterator[Sequence[int]]:
        """Ids of each word of a text; a token belongs to the word in which its last letter stands."""
        encoding = self._encode(text)
        ids, ends = encoding.ids, [end for _, end in encoding.offsets]
        first, behind = 0, 0
        for word in words:
            behind += len(word)
            last = bisect_right(ends, behind, lo=first)
            yield ids[first:last]
            first = last


def word_pattern(spec: Mapping[str, Any]) -> re.Pattern[str] | None:
    """Matches word after word of any text, white space included.

    Args:
        spec: a tokenizer.json.

    Returns:
        None where cuts between words could change the ids. They cannot where no added token spans a cut or takes the white
        space beside it, where each step before the merges looks at single letters or stops at white space, and where
        no merge spans a cut; a letter that some merge ties to white space behind it ends no word.
    """
    model = spec["model"]
    rewriters = _flat(spec["normalizer"], "normalizers")
    splitters = _flat(spec["pre_tokenizer"], "pretokenizers")
    spellers = rewriters + [step for step in splitters if step["type"] in ("Metaspace", "ByteLevel")]
    if (
        spec["truncation"] is not None
        or spec["padding"] is not None
        or not all(_keeps_to_itself(token) for token in spec["added_tokens"])
        or not all(step in spellers or _takes_lines_or_digits(step) for step in splitters)
        or not _adds_nothing(spec["post_processor"])
        or not _is_plain(model)
        or len(spellers) != 1
    ):
        return None
    if _splits_at_spaces(spellers[0]):
        return _pattern("")
    ties = _ties(model) if _marks_spaces(spellers[0]) else None
    return None if ties is None else _pattern(_SPACE_MARK + "".join(sorted(ties)))


def _pattern(ties: str) -> re.Pattern[str]:
    """White space and what follows, up to a space or line break behind a letter that is none of `ties`."""
    no_cut = r"[^\S \n]" + (rf"|(?<=[{re.escape(ties)}])[ \n]" if ties else "")
    return re.compile(rf"\s*+\S++(?:(?:{no_cut})\s*+\S*+)*+|\s+")


def _flat(step: Mapping[str, Any] | None, parts: str) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    return list(step[parts]) if step["type"] == "Sequence" else [step]


def _keeps_to_itself(token: Mapping[str, Any]) -> bool:
    takes_more = token["single_word"] or token["lstrip"] or token["rstrip"]
    return not takes_more and not re.search(rf"[\s{_SPACE_MARK}]", token["content"])


def _takes_lines_or_digits(step: Mapping[str, Any]) -> bool:
    if step["type"] == "Digits":
        return True
    return _PIECES_OF_LINES.items() <= step.items() and step["pattern"] in _LINE_BREAKS


def _adds_nothing(step: Mapping[str, Any] | None) -> bool:
    """When no special tokens are asked for; templates may repeat a text in theory."""
    if step is None or step["type"] == "ByteLevel":
        return True
    return step["type"] == "TemplateProcessing" and sum("Sequence" in part for part in step["single"]) == 1


def _is_plain(model: Mapping[str, Any]) -> bool:
    """Merges alone decide, and always in the same way."""
    extras = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    return model["type"] == "BPE" and not any(model[name] for name in extras)


def _splits_at_spaces(step: Mapping[str, Any]) -> bool:
    return step["type"] == "ByteLevel" and bool(step.get("use_regex")) and not step["add_prefix_space"]


def _marks_spaces(step: Mapping[str, Any]) -> bool:
    """Writes the mark for each space, and nothing else."""
    if step["type"] == "Replace":
        return step["pattern"] == {"String": " "} and bool(step["content"] == _SPACE_MARK)
    return step["type"] == "Metaspace" and (step["replacement"], step["prepend_scheme"]) == (_SPACE_MARK, "never")


def _ties(model: Mapping[str, Any]) -> set[str] | None:
    """Letters before white space to which merges tie it; None where they cannot be told."""
    vocab = model["vocab"]
    has_all_bytes = model["byte_fallback"] and all(f"<0x{byte:02X}>" in vocab for byte in range(256))
    if _SPACE_MARK not in vocab or ("\n" not in vocab and not has_all_bytes):
        return None  # it is unknown, and unknown letters may become one
    ties: set[str] = set()
    for left, right in model["merges"]:
        if right.startswith((_SPACE_MARK, "\n", "<0x0A>")):
            if _BYTE_PIECE.fullmatch(left):
                return None
            ties.add(left[-1])
    return ties
