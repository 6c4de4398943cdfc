"""Grammar text -> which tokens may come next. The only file that speaks to llguidance.

A matcher's state is a pure function of vocabulary, grammar and the tokens it was given, so whoever continues an answer
has the same one. Knows no sequence and no thread. All work is bounded, in steps and not in seconds, so that the same
grammar fails or works everywhere; what compiling may cost is bounded by `check`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import llguidance
import numpy as np
from numpy.typing import NDArray

from ernie_cluster.errors import InvalidRequest

# Without it, forced text is spelled out to its end at every step, which takes seconds for a million letters.
_HEADER = '%llguidance {"no_forcing": true}\n'

_MAX_MESSAGE = 200


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """What a model can say."""

    tokens: Sequence[bytes]
    """Text of each token id; b"" for those that are never part of an answer's text."""
    end_token_ids: tuple[int, ...]
    """Tokens that end an answer; at least one."""


def byte_vocabulary() -> Vocabulary:
    """A token for each byte, and an end: enough to judge a grammar by."""
    return Vocabulary([*(bytes([byte]) for byte in range(256)), b""], (256,))


class _Words:
    """A vocabulary in the form that llguidance asks for."""

    bos_token_id = None
    special_token_ids: tuple[int, ...] = ()

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.eos_token_id = vocabulary.end_token_ids[0]
        ends = set(vocabulary.end_token_ids)
        self.tokens = [b"" if i in ends else text for i, text in enumerate(vocabulary.tokens)]

    def __call__(self, text: bytes) -> list[int]:
        raise AssertionError("text is encoded only where some is forced")


class Compiler:
    """Compiles grammars for one vocabulary; safe to share between threads."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        words: Any = llguidance.TokenizerWrapper(_Words(vocabulary))
        ends = list(vocabulary.end_token_ids)
        self._tokenizer = llguidance.LLTokenizer(words, n_vocab=len(vocabulary.tokens), eos_token=ends)
        self._limits = llguidance.LLParserLimits(
            max_lexer_states=20_000,  # 1 to 2 kB each
            precompute_large_lexemes=False,
            verbose_errors=False,
        )

    def compile(self, text: str) -> Matcher:
        """A matcher before its first token; raises InvalidRequest."""
        matcher = llguidance.LLMatcher(self._tokenizer, _HEADER + text, log_level=0, limits=self._limits)
        return Matcher(matcher, self._tokenizer.vocab_size)


class Matcher:
    """Follows one answer. One thread at a time."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size
        self._check()

    def copy(self) -> Matcher:
        return Matcher(self._matcher.deep_copy(), self._vocab_size)

    def allowed(self) -> NDArray[np.bool_]:
        """Whether each token may come next, bool [vocabulary], at least one; end tokens where the answer may end.

        Raises:
            InvalidRequest: the grammar is too complex to say, or leads nowhere.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        mask = np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)
        if not mask.any():
            raise InvalidRequest("the grammar leads to a point where nothing can follow", code="invalid_grammar")
        return mask

    def consume(self, tokens: Sequence[int]) -> None:
        """Take the next tokens of the answer; raises InvalidRequest when they do not fit."""
        self._matcher.consume_tokens(list(tokens))
        self._check()

    @property
    def is_finished(self) -> bool:
        """The answer is complete, and nothing can follow."""
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InvalidRequest(_reason(self._matcher.get_error()), code="invalid_grammar")


def _reason(message: str) -> str:
    """What llguidance has against a grammar, in a line and without the grammar itself."""
    lines = message.strip().splitlines() or [""]
    verdict = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    verdict = verdict.rpartition("(in regex): ")[2].partition(" in regex /")[0]
    if verdict.startswith("at "):  # a place in our own text
        verdict = verdict.partition("): ")[2]
    if "fuel exhausted" in verdict:  # llguidance's own bound, which a fast machine meets before ours of time
        return "this is too complex: compiling it takes too many steps; simplify it"
    return f"this cannot be enforced: {'no text fits it' if verdict == 'NoExtensionBias' else verdict[:_MAX_MESSAGE]}"
