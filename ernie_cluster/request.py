"""What travels between the parts: a request is a value, and so is each piece of its answer.

A `GenerationRequest` holds all that determines its output: prompt tokens, media, positions, sampling
parameters with a seed, and the output tokens so far. Any replica can therefore go on with any request.
Knows no text, no tensor library and no Ray; plain data and numpy only.
"""

from __future__ import annotations

import enum
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

MediaKind = Literal["image", "video"]


class FinishReason(enum.StrEnum):
    """Why an answer ended, in OpenAI's words where they have one."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


_PATIENCE_TOKENS = 3
"""Positions on which a grammar may refuse to end the reasoning: it wants the last bytes of a character first."""


@dataclass(frozen=True, slots=True)
class ThinkingLimit:
    """Ends the reasoning of a model that does not end it in time; for answers that begin inside it.

    What is forced is a pure function of limit and output, so whoever continues an answer forces the same.
    """

    max_tokens: int
    """Tokens of reasoning, at least 0; those that are forced come on top."""
    mark: tuple[int, ...]
    """Tokens with which the reasoning is over, whoever chose them; the same text in other tokens is not seen."""
    ending: tuple[int, ...]
    """Tokens that are forced, `mark` among them."""

    def next_token(self, tokens: Sequence[int], start: int) -> int | None:
        """The token that has to follow the output `tokens[start:]`; None where the choice is free.

        With max_tokens 2, mark (9,) and ending (1, 9, 1), the output [5, 6] goes on with 1, 9 and 1, and [5, 9] is free.
        Where a grammar refuses a token, the ending begins anew.
        """
        num_late = len(tokens) - start - self.max_tokens
        if not 0 <= num_late < len(self.ending) + _PATIENCE_TOKENS:
            return None
        output = tuple(tokens[start:])
        lengths = range(min(num_late + 1, len(self.ending)))
        num_begun = max(n for n in lengths if output[len(output) - n :] == self.ending[:n])
        before = output[: len(output) - num_begun]
        is_over = any(before[i : i + len(self.mark)] == self.mark for i in range(len(before)))
        return None if is_over else self.ending[num_begun]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when to stop. Ranges are checked by the API, which names the field."""

    max_tokens: int = 256
    """Most tokens to generate, at least 1."""
    min_tokens: int = 0
    """End-of-sequence and stop tokens cannot be chosen before this many output tokens."""
    temperature: float = 1.0
    """0 is greedy; else logits are divided by it."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this; 1 keeps all."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest one; 0 keeps all."""
    seed: int = 0
    """Random numbers are a pure function of (seed, output position). 64 bits, non-negative."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the prompt or output; 1 is off."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each token already in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once per occurrence in the output."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, added to its logit)."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer beside the model's own end-of-sequence tokens."""
    ignore_eos: bool = False
    """Go on after an end-of-sequence token until `max_tokens`."""
    num_logprobs: int | None = None
    """Likeliest tokens to report with each output token, see `TokenLogprobs`; None reports nothing at all."""
    grammar: str = ""
    """What the answer's text must match, as `grammar/write.py` writes it; empty lets anything pass.

    The answer ends with the token after which nothing can follow. Where the grammar lets it end earlier, an
    end-of-sequence token may be chosen, and ends it whatever `ignore_eos` says. `min_tokens` forbids that token only
    as long as there is another one."""
    thinking: ThinkingLimit | None = None
    """When the reasoning is made to end; None lets the model think as long as it likes. A grammar goes before it."""

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """Whether the choice depends on which tokens there are already."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(frozen=True, slots=True, eq=False)
class MediaInput:
    """One picture or video of a prompt, as patches.

    The hash covers kind, grid and all patch bytes with SHA-256, so it may serve as a cache key across tenants'
    boundaries without collisions.
    """

    kind: MediaKind
    media_hash: bytes
    """32 bytes, see `hash_media`."""
    grid_thw: tuple[int, int, int]
    """Grid in patches of 14x14 pixels: frames (1 for an image, even for a video), height, width (both even)."""
    offset: int
    """Index in the prompt of the first placeholder token."""
    num_tokens: int
    """Placeholder tokens, consecutive from `offset`: h*w/4 for an image, t/2*h*w/4 for a video."""
    patches: NDArray[np.uint8] | None
    """uint8 [t*h*w, 588] in merge-block order, not normalised; None where only the books are needed."""

    @property
    def end(self) -> int:
        """One past the last placeholder token."""
        return self.offset + self.num_tokens

    @property
    def num_pixels(self) -> int:
        """As the model sees it."""
        return math.prod(self.grid_thw) * 14 * 14

    @property
    def num_bytes(self) -> int:
        return 0 if self.patches is None else self.patches.nbytes


def hash_media(kind: MediaKind, grid_thw: Sequence[int], patches: NDArray[np.uint8]) -> bytes:
    """SHA-256 over kind, grid and patch bytes; 32 bytes."""
    digest = hashlib.sha256(f"{kind}:{','.join(map(str, grid_thw))}:".encode())
    digest.update(np.ascontiguousarray(patches).data)
    return digest.digest()


@dataclass(frozen=True, slots=True, eq=False)
class GenerationRequest:
    """All that determines an answer."""

    request_id: str
    model: str
    """Served model name."""
    prompt_token_ids: NDArray[np.int32]
    """int32 [N], N >= 1, with one placeholder token per merged patch."""
    positions: NDArray[np.int32]
    """int32 [3, N]: temporal, height and width position of every prompt token."""
    sampling: SamplingParams
    media: tuple[MediaInput, ...] = ()
    """In prompt order, not overlapping."""
    eos_token_ids: tuple[int, ...] = ()
    """The model's own end tokens."""
    output_token_ids: tuple[int, ...] = ()
    """Tokens already generated, when a request is continued elsewhere."""
    cache_salt: bytes = b""
    """Prefix-cache entries are shared only between requests with the same salt."""
    timeout_s: float = 600.0
    """Deadline, counted from acceptance."""
    priority: int = 0
    """Of the sequences that wait on an engine, those with a lower number start first, and when KV blocks run out they keep
    theirs longer. Nothing ages: under a steady stream of lower numbers the others wait until their deadline."""

    tenant: str = ""
    """Name of the API key that it came with; where requests wait, the tenants take turns."""

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def max_total_tokens(self) -> int:
        """Most tokens that the sequence can ever hold."""
        return self.num_prompt_tokens + self.sampling.max_tokens

    def block_hashes(self, block_size: int) -> list[bytes]:
        """See `block_hashes`; of the prompt, and of the answer so far where it goes on from one."""
        tokens = self.prompt_token_ids
        if self.output_token_ids:
            tokens = np.concatenate([tokens, np.asarray(self.output_token_ids, np.int32)])
        return block_hashes(tokens, self.media, block_size, self.cache_salt)

    @property
    def position_delta(self) -> int:
        """What is added to a token's index after the prompt to get its position (all axes); <= 0."""
        return int(self.positions.max()) + 1 - self.num_prompt_tokens


@dataclass(frozen=True, slots=True)
class Span:
    """One stage of a request's journey."""

    name: str
    """queue, preprocess, route, encode, transfer, prefill, decode, ..."""
    start_s: float
    """Wall clock, seconds since the epoch."""
    duration_s: float
    detail: tuple[tuple[str, str | int | float], ...] = ()
    """For example (("bytes", 57344), ("replica", "decode-1"))."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of probabilities at one output position.

    They are the model's own: the log-softmax of its logits, before penalties, biases and temperature.
    """

    chosen: float
    """Of the token that was chosen."""
    top: tuple[tuple[int, float], ...]
    """(token id, its value), likeliest first, as many as were asked for."""


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """New tokens of one request. The last event of a request, and only that one, bears a finish reason."""

    request_id: str
    index: int
    """Output position of the first of `token_ids`, 0-based."""
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    """Prompt tokens that came from a prefix cache; valid on the last event."""
    spans: tuple[Span, ...] = field(default=())
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One per token id, if the request asks for them."""


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """The other way in which a request ends on an engine: with one of our errors."""

    request_id: str
    error: Exception


def block_hashes(
    token_ids: Sequence[int] | NDArray[np.int32],
    media: Sequence[MediaInput],
    block_size: int,
    salt: bytes = b"",
) -> list[bytes]:
    """Hash chain over the full blocks of a prompt; a block's hash covers all that stands before it.

    Placeholder tokens look alike for all pictures, so each block also takes in the hash of every picture that
    overlaps it, with the place where it starts.

    Args:
        token_ids: [N] token ids.
        media: pictures and videos of the prompt.
        block_size: tokens per block.
        salt: entries with different salts never meet.

    Returns:
        N // block_size digests of 32 bytes.
    """
    out: list[bytes] = []
    extend_hashes(out, token_ids, media, block_size, salt)
    return out


def extend_hashes(
    hashes: list[bytes],
    token_ids: Sequence[int] | NDArray[np.int32],
    media: Sequence[MediaInput],
    block_size: int,
    salt: bytes = b"",
) -> None:
    """Append what `block_hashes` of these tokens has beyond `hashes`, which are those of its first blocks."""
    previous = hashes[-1] if hashes else hashlib.sha256(b"ernie-kv-1:" + salt).digest()
    done = len(hashes) * block_size
    ids = np.ascontiguousarray(token_ids[done:], dtype="<i4")
    spans = sorted((m.offset, m.end, m.media_hash) for m in media if m.end > done)
    first = 0
    for start in range(done, done + len(ids) - block_size + 1, block_size):
        end = start + block_size
        digest = hashlib.sha256(previous)
        digest.update(ids[start - done : end - done].data)
        while first < len(spans) and spans[first][1] <= start:
            first += 1
        for offset, stop, media_hash in _overlapping(spans, first, start, end):
            digest.update(f"{offset - start}:{stop - start}:".encode() + media_hash)
        previous = digest.digest()
        hashes.append(previous)


def _overlapping(
    spans: list[tuple[int, int, bytes]], first: int, start: int, end: int
) -> Iterator[tuple[int, int, bytes]]:
    for i in range(first, len(spans)):
        if spans[i][0] >= end:
            return
        if spans[i][1] > start:
            yield spans[i]
