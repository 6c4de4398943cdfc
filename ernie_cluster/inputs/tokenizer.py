"""Text to token ids and back, with the checkpoint's own tokenizer.

Two rules stand above the library's: text of a user never becomes a control token, and an answer's text is given out
as tokens arrive without splitting a character. Knows no messages and no model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from ernie_cluster.errors import CheckpointError
from ernie_cluster.inputs.words import WordEncoder, word_pattern

MARKUP = frozenset(
    f"<{slash}{name}>" for name in ("think", "response", "tool_call", "tool_list", "tool_output") for slash in ("", "/")
)
"""Control tokens that belong to an answer's text: the parsers read them, so decoding never drops them."""

_TAG = re.compile(r"<[^<>\s]+>")
_PIPED_TAG = re.compile(r"<\|[^<>\s]+\|>")
_REPLACEMENT = "\ufffd"
_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")
_ANY_TEXT, _NO_TEXT, _LIKE_BYTE_PIECE = re.compile(""), re.compile("(?!)"), re.compile("<0x")
_FALLBACK_STEPS = [
    {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
"""Decoder of the vocabularies that SentencePiece models become."""


class Tokenizer:
    """One checkpoint's tokenizer; immutable, and safe to share between threads.

    Args:
        backend: the library's tokenizer, with all added tokens.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        spec = json.loads(backend.to_str())
        self._backend = backend
        self._words = WordEncoder(backend, word_pattern(spec))
        added = {
            i: t for i, t in backend.get_added_tokens_decoder().items() if len(t.content) > 1
        }  # digits steer nothing
        # by spelling, too: converted SentencePiece models do not mark their user-defined symbols as special
        controls = {i: token.content for i, token in added.items() if token.special or _TAG.fullmatch(token.content)}
        self._controls = controls
        self._plain = _without_added_tokens(spec, set(controls.values()))
        self.special_ids = frozenset(
            i for i, text in controls.items() if text not in MARKUP and (added[i].special or _PIPED_TAG.fullmatch(text))
        )
        """Tokens that `skip_special` leaves out."""
        self.control_texts = frozenset(controls.values())
        """Spelling of every token that steers the model, `MARKUP` included."""
        self._added = {i: token.content for i, token in backend.get_added_tokens_decoder().items()}
        self._spells_bytes = '"ByteLevel"' in json.dumps(spec["decoder"])
        self.own_texts: Mapping[int, str] = _OwnTexts(backend, spec["decoder"])
        """By id: the text of a token that reads the same behind any whole characters; "" for all others."""

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Read `tokenizer.json`; where only `tokenizer.model` exists, convert it with transformers.

        Raises:
            CheckpointError: neither file is there, or it cannot be read.
        """
        path = Path(folder) / "tokenizer.json"
        if path.exists():
            try:
                return cls(tokenizers.Tokenizer.from_file(str(path)))
            except Exception as e:  # the library raises bare Exception
                raise CheckpointError(f"{path}: not a tokenizer: {e}") from None
        if path.with_suffix(".model").exists():
            return cls(_convert_sentencepiece(path.with_suffix(".model")))
        raise CheckpointError(f"{path}: not found, and no tokenizer.model either; add one of them to the checkpoint")

    @property
    def vocab_size(self) -> int:
        """Number of tokens with added ones; ids of the embedding beyond it decode to nothing."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def token_id(self, text: str) -> int | None:
        """Id of a token by its exact spelling, or None."""
        return self._backend.token_to_id(text)

    def encode(self, text: str, *, allow_special: bool) -> list[int]:
        """Token ids of `text`; nothing is added in front or behind.

        Args:
            text: valid Unicode, no lone surrogates.
            allow_special: spellings of control tokens become those tokens; else they are encoded like any text.
        """
        if allow_special:
            return self._words.encode(text)
        ids: list[int] = []
        for i in self._plain.encode(text, add_special_tokens=False).ids:
            if i in self._controls:  # the vocabulary itself can spell a control token: letter by letter it cannot
                ids += [
                    j for letter in self._controls[i] for j in self._plain.encode(letter, add_special_tokens=False).ids
                ]
            else:
                ids.append(i)
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD, unknown ids nothing."""
        return str(self._backend.decode(self.visible(ids, skip_special), skip_special_tokens=False))

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 that a token stands for, maybe a part of a character; b"" for an id that is no token."""
        piece = self._added.get(token_id) or self._backend.id_to_token(token_id)
        if piece is None:
            return b""
        if token_id in self._added:
            return str(piece).encode()
        if self._spells_bytes:
            letters = [_BYTE_OF_LETTER.get(letter) for letter in piece]
            return bytes(b for b in letters if b is not None) if None not in letters else str(piece).encode()
        byte = _BYTE_PIECE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else str(piece).replace("\u2581", " ").encode()

    def text_bytes(self, size: int) -> list[bytes]:
        """`token_bytes` of the ids up to `size`, but b"" for those that an answer's text leaves out."""
        return [b"" if i in self.special_ids else self.token_bytes(i) for i in range(size)]

    def visible(self, ids: Iterable[int], skip_special: bool) -> list[int]:
        """The ids that have a text: known ones, without special tokens if so wished."""
        hidden = self.special_ids if skip_special else frozenset()
        return [i for i in ids if i not in hidden and self._backend.id_to_token(i) is not None]


def _byte_letters() -> dict[str, int]:
    """Byte-level vocabularies write a byte as the letter of that number if it can be seen, else as one from 256 on."""
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(unseen)}


_BYTE_OF_LETTER = _byte_letters()


class _OwnTexts(dict[int, str]):
    """See `Tokenizer.own_texts`; fills as it is asked.

    In a byte-level vocabulary all tokens but parts of characters have a text of their own, in one with a token for each
    byte all but these. Of decoders of another kind nothing is known.
    """

    def __init__(self, backend: tokenizers.Tokenizer, decoder: Mapping[str, Any] | None) -> None:
        super().__init__()
        self._backend = backend
        steps = [] if decoder is None else decoder.get("decoders", [decoder])
        is_byte_level = [step["type"] for step in steps] == ["ByteLevel"]
        self._dependent = _NO_TEXT if is_byte_level else _LIKE_BYTE_PIECE if steps == _FALLBACK_STEPS else _ANY_TEXT

    def __missing__(self, token_id: int) -> str:
        piece = self._backend.id_to_token(token_id)
        text = ""
        if piece is not None and not self._dependent.match(piece):
            text = str(self._backend.decode([token_id], skip_special_tokens=False))
        return self.setdefault(token_id, "" if _REPLACEMENT in text else text)


class IncrementalDecoder:
    """Text of one answer, given out as its tokens arrive.

    What `push` returned so far plus `flush()` equals `Tokenizer.decode` of all tokens, however they were chunked.
    (Byte-fallback vocabularies differ in one case: bytes that are no UTF-8 spoil the letters before them in a whole
    decode, but not letters that were given out already.)

    Args:
        tokenizer: decodes.
        skip_special: leave out special tokens.
    """

    # The window is [context | pending]. The context's text has been given out; it is there because a token's text can
    # depend on the token before it. At a letter's end pending becomes context. A run of broken bytes has no letter's
    # end, so it is cut at `_MAX_PENDING`: UTF-8 falls into step again within 4 bytes, and a visible token has at
    # least one.
    _MAX_PENDING = 32
    _TAIL = 8

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids if skip_special else frozenset[int]()
        self._window: list[int] = []
        self._num_context = 0
        self._num_given = 0
        """Characters of the window's text that were given out."""

    def push(self, ids: Sequence[int]) -> str:
        """Take new tokens; returns the text that is complete now, possibly empty. Cost: a few tokens' decode for each."""
        return "".join([self._push(i) for i in ids])

    def flush(self) -> str:
        """The rest, a broken character as U+FFFD; afterwards the decoder is as new."""
        rest = self._decode()[self._num_given :]
        self._window, self._num_context, self._num_given = [], 0, 0
        return rest

    def _push(self, token_id: int) -> str:
        if token_id in self._hidden:
            return ""
        if len(self._window) == self._num_context:  # nothing is pending
            own = self._tokenizer.own_texts[token_id]
            if own:
                self._window, self._num_context, self._num_given = [token_id], 1, len(own)
                return own
        if not self._tokenizer.visible((token_id,), skip_special=False):
            return ""
        self._window.append(token_id)
        text = self._decode()
        whole = text.rstrip(_REPLACEMENT)
        if len(whole) == len(text) > self._num_given:
            return self._settle(text)
        if len(self._window) - self._num_context > self._MAX_PENDING:
            return self._cut(text)
        return self._give(text, len(whole))

    def _settle(self, text: str) -> str:
        given = text[self._num_given :]
        self._window = self._window[self._num_context :]
        self._num_context = len(self._window)
        self._num_given = len(self._decode())
        return given

    def _cut(self, text: str) -> str:
        given = self._give(text, len(text) - 1)
        num_left = len(text) - self._num_given
        self._window, self._num_context = self._window[-self._TAIL :], 0
        self._num_given = len(self._decode()) - num_left
        return given

    def _give(self, text: str, end: int) -> str:
        given = text[self._num_given : end]
        self._num_given = max(self._num_given, end)
        return given

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special=False)


def _without_added_tokens(spec: Mapping[str, Any], texts: set[str]) -> tokenizers.Tokenizer:
    """The tokenizer of this tokenizer.json, but the given added tokens are ordinary text."""
    others = [token for token in spec["added_tokens"] if token["content"] not in texts]
    plain: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(json.dumps({**spec, "added_tokens": others}))
    return plain


def _convert_sentencepiece(path: Path) -> tokenizers.Tokenizer:
    from transformers import LlamaTokenizer  # slow to import, and needed by old checkpoints only

    try:
        converted = LlamaTokenizer.from_pretrained(path.parent, add_bos_token=False, add_prefix_space=False)
    except Exception as e:  # whatever the conversion meets, the remedy is the same
        raise CheckpointError(
            f"{path}: cannot be converted ({type(e).__name__}: {e}); install sentencepiece, or add a tokenizer.json"
        ) from None
    backend: tokenizers.Tokenizer = converted.backend_tokenizer
    return backend


_END_TEXTS = ("</s>", "<|end_of_sentence|>")
"""The models were trained to stop at the first; finished turns of a prompt end with the second."""


def end_token_ids(folder: str | Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens that end an answer: by generation_config.json, and by spelling.

    The number in config.json is asked only when these give none: flat ones hold the training's 0 and 1.

    Raises:
        CheckpointError: none is found, or a file cannot be read.
    """
    found = _eos_token_ids(Path(folder) / "generation_config.json")
    found += [i for text in _END_TEXTS if (i := tokenizer.token_id(text)) is not None]
    found = found or _eos_token_ids(Path(folder) / "config.json")
    if not found:
        raise CheckpointError(f"{folder}: no end-of-sequence token; add eos_token_id to generation_config.json")
    return tuple(dict.fromkeys(found))


def _eos_token_ids(path: Path) -> list[int]:
    try:
        value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        return [] if value is None else [int(i) for i in (value if isinstance(value, list) else [value])]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{path}: eos_token_id cannot be read: {e}") from None
