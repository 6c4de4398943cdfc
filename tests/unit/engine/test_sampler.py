"""The sampler against naive formulas, one row at a time in plain Python; and chance, which must be a pure function."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import composite

from ernie_cluster.engine import sampler
from ernie_cluster.engine.sampler import SamplerRow, sample, uniform
from ernie_cluster.request import SamplingParams

VOCAB = 12


def row(position: int = 0, prompt: tuple[int, ...] = (), output: tuple[int, ...] = (), **params: object) -> SamplerRow:
    return SamplerRow(SamplingParams(**params), position, prompt, output, (2,))  # type: ignore[arg-type]


def random_logits(seed: int, rows: int, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


# ---- chance


@given(st.integers(0, 2**64 - 1), st.integers(0, 10**6))
def test_uniform_is_a_pure_function_into_the_unit_interval(seed: int, position: int) -> None:
    first = uniform(seed, position)
    assert 0.0 <= first < 1.0
    assert uniform(seed, position) == first


def test_uniform_is_the_same_for_ever() -> None:
    """A request that is continued by a newer version draws what the older one would have drawn."""
    draws = [uniform(0, 0), uniform(0, 1), uniform(1, 0), uniform(2**64 - 1, 99)]
    assert draws == [0.6524484863740322, 0.03401170130434639, 0.36818951565166946, 0.3299047344444277]


@pytest.mark.parametrize(
    "pairs",
    [
        [(7, position) for position in range(20_000)],
        [(seed, 0) for seed in range(20_000)],
        [(seed, 100 - seed % 100) for seed in range(20_000)],
        [(seed << 40, 3) for seed in range(20_000)],
    ],
    ids=["along one answer", "over seeds", "both", "high bits of seeds"],
)
def test_uniform_is_even(pairs: list[tuple[int, int]]) -> None:
    """Chi-square over 64 cells: 63 degrees of freedom pass 103.4 once in a thousand; the seeds are fixed."""
    cells = Counter(int(uniform(*pair) * 64) for pair in pairs)
    expected = len(pairs) / 64
    assert sum((cells[i] - expected) ** 2 / expected for i in range(64)) < 103.4


def test_neighbouring_draws_do_not_know_each_other() -> None:
    """Chi-square over 16 x 16 cells of (this position, next), 255 degrees of freedom: 330.5 once in a thousand."""
    draws = [uniform(11, position) for position in range(40_001)]
    cells = Counter((int(a * 16), int(b * 16)) for a, b in itertools.pairwise(draws))
    expected = 40_000 / 256
    assert sum((cells[i, j] - expected) ** 2 / expected for i in range(16) for j in range(16)) < 330.5


def test_draws_follow_the_probabilities() -> None:
    """Chi-square over the tokens of one row, 11 degrees of freedom: 31.3 once in a thousand."""
    logits = random_logits(0, 1)
    n = 20_000
    tokens = Counter(sample(logits.repeat(n, 1), [row(position, temperature=1.7, seed=5) for position in range(n)]))
    probs = (logits[0].double() / 1.7).softmax(-1).tolist()
    assert sum((tokens[i] - n * p) ** 2 / (n * p) for i, p in enumerate(probs)) < 31.3


# ---- which tokens are left


def naive_kept(logits: list[float], params: SamplingParams) -> set[int]:
    """Ranked by logit, ties by id: first k, of these until top_p is reached, then those not far below the likeliest."""
    top = max(logits)
    weights = [math.exp((x - top) / params.temperature) for x in logits]
    ranked = sorted(range(len(logits)), key=lambda t: (-logits[t], t))[: params.top_k or None]
    total = sum(weights[t] for t in ranked)
    kept, reached = set(), 0.0
    for rank, token in enumerate(ranked):
        if rank == 0 or reached < params.top_p:
            kept.add(token)
        reached += weights[token] / total
    return {t for t in kept if weights[t] >= params.min_p * max(weights)}


def drawn(logits: torch.Tensor, monkeypatch: pytest.MonkeyPatch, **params: object) -> set[int]:
    """All tokens that can come out: a draw in the middle of each thousandth."""
    n = 4000
    with monkeypatch.context() as patch:
        patch.setattr(sampler, "uniform", lambda seed, position: (position + 0.5) / n)
        return set(sample(logits.repeat(n, 1), [row(i, **params) for i in range(n)]))


LOGITS = torch.tensor([0.5, 2.0, -1.0, 2.0, 1.0, 0.0, -0.5, 1.5, 0.25, -0.25, 0.75, 1.25])
"""No token below one in a hundred; two that tie."""


@pytest.mark.parametrize("temperature", [1.0, 1.9])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"top_k": 1},
        {"top_k": 2},
        {"top_k": 5},
        {"top_k": 100},
        {"top_p": 1e-9},
        {"top_p": 0.3},
        {"top_p": 0.55},
        {"top_p": 0.999},
        {"min_p": 0.2},
        {"min_p": 0.7},
        {"min_p": 1.0},
        {"top_k": 6, "top_p": 0.5},
        {"top_k": 3, "top_p": 0.9},
        {"top_p": 0.8, "min_p": 0.4},
        {"top_k": 3, "top_p": 0.5},
        {"top_k": 4, "top_p": 0.9, "min_p": 0.1},
    ],
    ids=str,
)
def test_exactly_the_right_tokens_are_left(
    params: dict[str, float], temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {"temperature": temperature, **params}
    expected = naive_kept(LOGITS.tolist(), SamplingParams(**whole))  # type: ignore[arg-type]
    assert drawn(LOGITS, monkeypatch, **whole) == expected


def test_what_is_left_keeps_its_proportions(monkeypatch: pytest.MonkeyPatch) -> None:
    n = 3000
    with monkeypatch.context() as patch:
        patch.setattr(sampler, "uniform", lambda seed, position: (position + 0.5) / n)
        tokens = Counter(sample(LOGITS.repeat(n, 1), [row(i, top_k=3) for i in range(n)]))
    weights = {token: math.exp(LOGITS[token]) for token in (1, 3, 7)}
    for token, weight in weights.items():
        assert tokens[token] / n == pytest.approx(weight / sum(weights.values()), abs=2 / n)


@given(st.integers(0, 10**6), st.integers(0, 50))
@settings(max_examples=30)
def test_greedy_is_argmax_whatever_the_seed(seed: int, position: int) -> None:
    logits = random_logits(seed, 3)
    expected = logits.argmax(-1).tolist()
    assert sample(logits, [row(position, temperature=0.0, seed=seed, top_p=0.5)] * 3) == expected


@pytest.mark.parametrize("temperature", [0.01, 1e-5, 1e-20, 1e-44, 1e-300, 5e-324])
def test_ever_colder_is_ever_greedier(temperature: float) -> None:
    logits = random_logits(1, 8, vocab=2000) * 10
    expected = logits.argmax(-1).tolist()
    for position in range(5):
        assert sample(logits.clone(), [row(position, temperature=temperature, seed=i) for i in range(8)]) == expected


def test_ever_hotter_is_ever_evener() -> None:
    n = 12_000
    tokens = Counter(sample(LOGITS.repeat(n, 1), [row(i, temperature=1e6, seed=9) for i in range(n)]))
    assert sum((tokens[i] - n / VOCAB) ** 2 / (n / VOCAB) for i in range(VOCAB)) < 31.3


# ---- what is done to the logits


def naive_logits(logits: list[float], r: SamplerRow) -> list[float]:
    p, out = r.params, list(logits)
    for token in {*r.prompt, *r.output}:
        out[token] = out[token] / p.repetition_penalty if out[token] > 0 else out[token] * p.repetition_penalty
    for token, count in Counter(r.output).items():
        out[token] -= p.presence_penalty + p.frequency_penalty * count
    for token, bias in p.logit_bias:
        out[token] += bias
    if r.position < p.min_tokens:
        for token in r.end_tokens:
            out[token] = -math.inf
    return out


tokens = st.integers(0, VOCAB - 1)


@composite
def rows(draw: st.DrawFn, temperature: st.SearchStrategy[float]) -> SamplerRow:
    output = tuple(draw(st.lists(tokens, max_size=6)))
    return SamplerRow(
        SamplingParams(
            temperature=draw(temperature),
            top_p=draw(st.sampled_from([1.0, 0.9, 0.4])),
            top_k=draw(st.sampled_from([0, 1, 4])),
            min_p=draw(st.sampled_from([0.0, 0.1])),
            seed=draw(st.integers(0, 2**64 - 1)),
            min_tokens=draw(st.integers(0, 6)),
            repetition_penalty=draw(st.sampled_from([1.0, 0.5, 2.0])),
            presence_penalty=draw(st.sampled_from([0.0, -1.5, 2.0])),
            frequency_penalty=draw(st.sampled_from([0.0, 0.7])),
            logit_bias=tuple(draw(st.dictionaries(tokens, st.sampled_from([-100.0, 1.5, 8.0]), max_size=3)).items()),
        ),
        position=len(output),
        prompt=tuple(draw(st.lists(tokens, min_size=1, max_size=4))),
        output=output,
        end_tokens=tuple(draw(st.sets(tokens, max_size=3))),
    )


@given(rows(st.just(0.0)), st.integers(0, 1000))
def test_penalties_biases_and_forbidden_ends_follow_their_formulas(r: SamplerRow, seed: int) -> None:
    logits = random_logits(seed, 1)
    expected = naive_logits(logits[0].tolist(), r)
    assert sample(logits, [r]) == [max(range(VOCAB), key=expected.__getitem__)]
    assert logits[0].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)


@given(rows(st.sampled_from([0.0, 0.7, 1.0, 2.0])))
def test_no_end_comes_before_min_tokens(r: SamplerRow) -> None:
    banned = set(r.end_tokens) if r.position < r.params.min_tokens else set()
    logits = torch.zeros(1, VOCAB)
    logits[0, list(r.end_tokens)] = 20.0
    for seed in range(5):
        params = dataclasses.replace(r.params, seed=seed)
        assert sample(logits.clone(), [dataclasses.replace(r, params=params)])[0] not in banned


# ---- rows are alone


@given(st.lists(rows(st.sampled_from([0.0, 0.7, 1.0, 2.0])), min_size=1, max_size=6), st.integers(0, 1000), st.data())
@settings(max_examples=60)
def test_a_row_knows_nothing_of_the_others(batch: list[SamplerRow], seed: int, data: st.DataObject) -> None:
    logits = random_logits(seed, len(batch))
    alone = [sample(logits[i : i + 1].clone(), [r])[0] for i, r in enumerate(batch)]
    assert sample(logits.clone(), batch) == alone
    order = data.draw(st.permutations(range(len(batch))))
    assert sample(logits[list(order)].clone(), [batch[i] for i in order]) == [alone[i] for i in order]


def test_who_keeps_all_tokens_keeps_them_beside_one_who_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A float32 sum reaches 1 before its end; the unlikeliest tokens must not be cut off for that."""
    logits = -torch.arange(30_000.0).repeat(2, 1) / 1000
    monkeypatch.setattr(sampler, "uniform", lambda seed, position: 1 - 1e-9)
    alone = sample(logits[:1].clone(), [row()])[0]
    assert alone > 20_000
    assert sample(logits.clone(), [row(), row(top_p=0.5)])[0] == alone


def test_a_tiny_repetition_penalty_leaves_numbers() -> None:
    logits = torch.tensor([[3.0, -2.0, 1.0, 0.0]])
    tokens = sample(logits, [row(0, temperature=1.0, repetition_penalty=1e-45, output=[0, 1])])
    assert logits.isfinite().all()
    assert tokens == [0]
