"""Logits -> token ids, and their log-probabilities for those who ask.

Chance is counter-based: the number drawn for an output position is a pure function of (seed, position), so whoever
continues a request draws what the first one would have drawn. Shapes: R rows (one per sequence), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ernie_cluster.request import SamplingParams, TokenLogprobs

_MASK64 = (1 << 64) - 1

_MIN_TEMPERATURE = 1e-5
"""Below it only the likeliest tokens are left anyway, and float32 could not divide any more."""

_MAX_LOGIT = 1e30
"""No penalty lifts or lowers a logit beyond it."""


def _mix(x: int) -> int:
    """SplitMix64's finaliser: every input bit moves every output bit. Source: Steele, Lea, Flood 2014."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but seed and output position."""
    return (_mix(_mix(seed & _MASK64) ^ position) >> 11) * 2.0**-53


@dataclass(frozen=True, slots=True, eq=False)
class SamplerRow:
    """What the sampler must know of one row."""

    params: SamplingParams
    position: int
    """Output position of the token to choose."""
    prompt: Seq[int]
    output: Seq[int]
    """Both may be left empty when no penalty asks for them."""
    end_tokens: tuple[int, ...]
    """Tokens that would end the answer."""
    allowed: Callable[[], NDArray[np.bool_] | None] | None = None
    """Called once the logits are there: the tokens that may be chosen, bool [V], or None for all."""
    forced: int | None = None
    """The token to choose whatever the model thinks, if it may be chosen."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """What came of the rows of one step."""

    tokens: list[int]
    """One per row."""
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    """By row; of those that ask."""


def sample_and_report(logits_RV: Tensor, rows: Seq[SamplerRow]) -> Sampled:
    """`sample`, and what the model thought of it; costs a log-softmax of the rows that ask, and only of these."""
    asking = [i for i, row in enumerate(rows) if row.params.num_logprobs is not None]
    if not asking:
        return Sampled(sample(logits_RV, rows))
    logprobs_AV = logits_RV[asking].log_softmax(-1)  # before `sample` changes the logits
    tokens = sample(logits_RV, rows)
    reports = _report(logprobs_AV, [tokens[i] for i in asking], [rows[i].params.num_logprobs or 0 for i in asking])
    return Sampled(tokens, dict(zip(asking, reports, strict=True)))


def _report(logprobs_AV: Tensor, tokens: list[int], counts: list[int]) -> list[TokenLogprobs]:
    """The chosen token and the likeliest ones of each row."""
    chosen = logprobs_AV.gather(1, _there(tokens, logprobs_AV.device)[:, None])[:, 0].tolist()
    values, ids = logprobs_AV.topk(min(max(counts), logprobs_AV.shape[-1]))
    ranked = [list(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]
    return [TokenLogprobs(c, tuple(row[:n])) for c, row, n in zip(chosen, ranked, counts, strict=True)]


def sample(logits_RV: Tensor, rows: Seq[SamplerRow]) -> list[int]:
    """Choose one token per row.

    Args:
        logits_RV: float32; changed in place for rows with penalties, biases or forbidden ends.
        rows: one per row.
    """
    for i, row in enumerate(rows):
        _shape_logits(logits_RV[i], row)
    out = logits_RV.argmax(-1)
    chance = [i for i, row in enumerate(rows) if not row.params.is_greedy]
    if chance and len(chance) == len(rows):
        out = _draw(logits_RV, rows)
    elif chance:
        there = _there(chance, out.device)
        out[there] = _draw(logits_RV.index_select(0, there), [rows[i] for i in chance])
    return out.tolist()  # the only time that a step waits for its device


def _there(
    values: Seq[float] | Seq[tuple[float, ...]] | NDArray[np.bool_],
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Numbers of the host on the device; the host does not wait until they are there."""
    if device.type == "cpu":
        return torch.as_tensor(values, dtype=dtype)
    return torch.as_tensor(values, dtype=dtype).pin_memory().to(device, non_blocking=True)


def _shape_logits(logits_V: Tensor, row: SamplerRow) -> None:
    """Penalties, biases, the ban on ending early, the tokens that a grammar leaves and the forced one, in place."""
    p = row.params
    if p.repetition_penalty != 1.0:
        seen = _there(sorted({*row.prompt, *row.output}), logits_V.device)
        value = logits_V[seen]
        value = torch.where(value > 0, value / p.repetition_penalty, value * p.repetition_penalty)
        logits_V[seen] = value.clamp(-_MAX_LOGIT, _MAX_LOGIT)  # two infinities would make every probability NaN
    if (p.presence_penalty or p.frequency_penalty) and row.output:
        ids, counts = _there(row.output, logits_V.device).unique(return_counts=True)  # type: ignore[no-untyped-call]
        logits_V[ids] -= p.presence_penalty + p.frequency_penalty * counts
    if p.logit_bias:
        ids = _there([i for i, _ in p.logit_bias], logits_V.device)
        logits_V[ids] += _there([b for _, b in p.logit_bias], logits_V.device, torch.float32)
    ends = list(row.end_tokens) if row.position < p.min_tokens else []
    allowed = None if row.allowed is None else row.allowed()
    if row.forced is not None and (allowed is None or allowed[row.forced]):
        logits_V.fill_(-torch.inf)
        logits_V[row.forced] = 0.0
        return
    if allowed is not None:
        logits_V.masked_fill_(_there(~allowed, logits_V.device), -torch.inf)
        if ends and not np.delete(allowed, ends).any():
            ends = []  # the answer cannot go on
    if ends:
        logits_V[ends] = -torch.inf


def _draw(logits_RV: Tensor, rows: Seq[SamplerRow]) -> Tensor:
    """Inverse of the cumulative distribution, after temperature, top-k, top-p and min-p. int64 [R]."""
    device, vocab = logits_RV.device, logits_RV.shape[-1]
    numbers = [
        (max(r.params.temperature, _MIN_TEMPERATURE), r.params.top_k or vocab, r.params.top_p, r.params.min_p,
         uniform(r.params.seed, r.position)) for r in rows
    ]  # fmt: skip
    temperature, top_k, top_p, min_p, target = _there(numbers, device, torch.float64).T[..., None]  # [R, 1] each
    probs = (logits_RV / temperature.float()).softmax(-1)
    if any(r.params.top_k > 0 or r.params.top_p < 1 for r in rows):
        ordered, ids = probs.sort(stable=True, dim=-1, descending=True)
        rank = torch.arange(vocab, device=device)[None]
        before = ordered.cumsum(-1) - ordered  # the token that crosses top_p stays
        # rounding lets `before` reach 1: who keeps all must not depend on it, nor on who else is in the batch
        top_p = top_p.float().masked_fill(top_p >= 1, torch.inf)
        in_top_k = rank < top_k
        total = (ordered * in_top_k).sum(-1, keepdim=True)  # top_p is a share of what top_k leaves
        keep = in_top_k & (before < top_p * total)
        keep[:, 0] = True
        probs = probs * torch.zeros_like(keep).scatter_(-1, ids, keep)
    if any(r.params.min_p > 0 for r in rows):
        floor = probs.amax(-1, keepdim=True) * min_p.float()
        probs = probs * (probs >= floor)
    # float64: over 100,000 tokens a float32 sum would round small ones away
    cumulative = probs.double().cumsum(-1)
    picked = torch.searchsorted(cumulative, target * cumulative[:, -1:], right=True)[:, 0]
    return picked.clamp_max(vocab - 1)
