"""The tokens behind an answer's content, with their log-probabilities.

A token is listed when its text, or a part of it, is shown as content: not reasoning, calls and their marks, stop
strings and end tokens. It comes with the first of its characters that is shown. Knows token ids by their bytes only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ernie_cluster.api.markup import AnswerParser
from ernie_cluster.request import TokenLogprobs


@dataclass(frozen=True, slots=True)
class ShownToken:
    """One token of the content."""

    token: bytes
    """UTF-8, maybe a part of a character."""
    logprob: float
    top: tuple[tuple[bytes, float], ...]
    """(token, log-probability), likeliest first."""
    offset: int
    """Character of the content at which its text begins."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A token whose place is not certain yet."""

    token_id: int
    logprobs: TokenLogprobs
    start: int
    end: int
    """Its characters in the answer's text, [start, end). Tokens that make a character together share it."""


class ShownTokens:
    """Finds the tokens behind one choice's content.

    Args:
        token_bytes: of a token id.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._without_text: list[tuple[int, TokenLogprobs]] = []
        self._waiting: deque[_Waiting] = deque()
        self._num_chars = 0
        self._num_shown = 0

    def push(self, token_id: int, logprobs: TokenLogprobs, num_chars: int) -> None:
        """Take the next token, which completed this many characters of the answer's text."""
        self._without_text.append((token_id, logprobs))
        self.extend(num_chars)

    def extend(self, num_chars: int) -> None:
        """More characters, which belong to the tokens that had none so far."""
        if num_chars:
            start, self._num_chars = self._num_chars, self._num_chars + num_chars
            self._waiting.extend(_Waiting(*token, start, self._num_chars) for token in self._without_text)
            self._without_text.clear()

    def take(self, parser: AnswerParser, num_new: int) -> list[ShownToken]:
        """The tokens that are certain by now.

        Args:
            parser: has been given all characters.
            num_new: characters of content that it has given out since the last call.
        """
        self._num_shown += num_new
        out: list[ShownToken] = []
        while self._waiting:
            token = self._waiting[0]
            offset = _offset(parser.passed, token)
            if offset is None:
                if parser.num_read < token.end:
                    break
            elif offset >= self._num_shown:
                break
            else:
                out.append(self._shown(token, offset))
            self._waiting.popleft()
        return out

    def _shown(self, token: _Waiting, offset: int) -> ShownToken:
        top = tuple((self._token_bytes(i), value) for i, value in token.logprobs.top)
        return ShownToken(self._token_bytes(token.token_id), token.logprobs.chosen, top, offset)


def _offset(passed: list[tuple[int, int]], token: _Waiting) -> int | None:
    """Place in the content of a token's first character there; None when it has none there, so far."""
    num_before = 0
    for start, end in passed:
        if end > token.start and start < token.end:
            return num_before + max(0, token.start - start)
        num_before += end - start
    return None


def chat_logprobs(tokens: list[ShownToken]) -> dict[str, Any]:
    """`logprobs` of a chat choice. A `token` that is no whole character shows U+FFFD; `bytes` has it in full."""
    content = [
        _entry(t.token, t.logprob) | {"top_logprobs": [_entry(token, value) for token, value in t.top]} for t in tokens
    ]
    return {"content": content, "refusal": None}


def _entry(token: bytes, logprob: float) -> dict[str, Any]:
    return {"token": token.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(token)}


def completion_logprobs(tokens: list[ShownToken]) -> dict[str, Any]:
    """`logprobs` of a completion choice. The token itself is always among `top_logprobs`, as with OpenAI."""
    return {
        "tokens": [_spelling(t.token) for t in tokens],
        "token_logprobs": [t.logprob for t in tokens],
        "top_logprobs": [_by_spelling((*t.top, (t.token, t.logprob))) for t in tokens],
        "text_offset": [t.offset for t in tokens],
    }


def _by_spelling(ranked: Iterable[tuple[bytes, float]]) -> dict[str, float]:
    """Of two tokens that are spelled alike the first counts."""
    out: dict[str, float] = {}
    for token, value in ranked:
        out.setdefault(_spelling(token), value)
    return out


def _spelling(token: bytes) -> str:
    """As text; parts of characters byte by byte, in OpenAI's way, for spellings are keys."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
