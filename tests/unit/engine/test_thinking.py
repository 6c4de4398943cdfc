"""Laws of the limit on reasoning: it holds, costs nothing where it is not reached, and is the same however it is computed."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ernie_cluster.engine.sampler import SamplerRow, sample_and_report
from ernie_cluster.grammar import write
from ernie_cluster.request import GenerationRequest, SamplingParams, ThinkingLimit
from tests.tiny import make_image, make_request, make_worker, tiny_tokenizer
from tests.unit.engine.test_handover import Path
from tests.unit.engine.test_laws import answers

MARK = (9,)
ENDING = (1, 9, 1, 1)
PROMPT = [4, 9, 4]


def holds(tokens: list[int], part: tuple[int, ...]) -> bool:
    return any(tuple(tokens[i : i + len(part)]) == part for i in range(len(tokens)))


def ids(text: str) -> tuple[int, ...]:
    return tuple(tiny_tokenizer().encode(text, allow_special=True))


def limit_of(max_tokens: int) -> ThinkingLimit:
    return ThinkingLimit(max_tokens, ids("</think>"), ids("\n</think>\n\n"))


# ---- the limit alone


@settings(max_examples=50)
@given(
    st.integers(0, 6), st.lists(st.integers(1, 9), min_size=20, max_size=20), st.sampled_from([(9,), (9, 1), (2, 9)])
)
@example(3, [9] * 20, (9,))
@example(2, [1, 1, 9] + [1] * 17, (9,))
def test_a_thought_ends_at_the_limit_and_once(max_tokens: int, choices: list[int], mark: tuple[int, ...]) -> None:
    limit = ThinkingLimit(max_tokens, mark, (1, *mark, 1, 1))
    output: list[int] = []
    forced: list[int] = []
    for choice in choices:
        token = limit.next_token(PROMPT + output, len(PROMPT))
        forced += [] if token is None else [token]
        output.append(choice if token is None else token)
    if holds(choices[:max_tokens], mark):
        assert (forced, output) == ([], choices)
    else:
        end = max_tokens + len(limit.ending)
        assert tuple(forced) == limit.ending == tuple(output[max_tokens:end])
        assert output[:max_tokens] + output[end:] == choices[:max_tokens] + choices[end:]


@pytest.mark.parametrize("num_refused", [1, 2, 3])
@pytest.mark.parametrize("begun", range(len(ENDING)))
def test_a_refused_token_is_tried_again(num_refused: int, begun: int) -> None:
    """A grammar that wants other tokens first: the mark comes as soon as it lets it come."""
    limit = ThinkingLimit(2, MARK, ENDING)
    output = [5, 5, *ENDING[:begun], *[7] * num_refused]
    wanted = [limit.next_token(output + list(ENDING[:n]), 0) for n in range(len(ENDING))]
    if holds(output, MARK):
        assert wanted == [None] * len(ENDING)
    elif begun + num_refused <= 3:
        assert wanted == list(ENDING)


def test_a_mark_of_the_models_own_ends_the_forcing() -> None:
    limit = ThinkingLimit(2, MARK, ENDING)
    assert [limit.next_token([5, 5, *late], 0) for late in ([7], [7, 9], [7, 9, 1])] == [1, None, None]


def test_after_its_few_positions_nothing_is_forced_any_more() -> None:
    limit = ThinkingLimit(2, MARK, ENDING)
    assert [limit.next_token([5] * n, 0) is None for n in (0, 1, 2, 8, 9, 100)] == [
        True,
        True,
        False,
        False,
        True,
        True,
    ]


# ---- the sampler


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_forced_token_is_chosen_and_its_logprob_is_the_models_own(temperature: float) -> None:
    logits = torch.randn(2, 40, generator=torch.Generator().manual_seed(2))
    params = SamplingParams(
        temperature=temperature,
        top_k=3,
        top_p=0.5,
        min_p=0.4,
        min_tokens=9,
        repetition_penalty=1.3,
        logit_bias=((17, -100.0),),
        num_logprobs=2,
    )
    row = SamplerRow(params, 3, (17,), (17,), (17,), forced=17)
    sampled = sample_and_report(logits.clone(), [row, dataclasses.replace(row, forced=None)])
    assert sampled.tokens[0] == 17 != sampled.tokens[1]
    assert sampled.logprobs[0].chosen == pytest.approx(float(logits[0].log_softmax(-1)[17]), abs=1e-5)
    assert sampled.logprobs[0].top[0][0] == int(logits[0].argmax())


# ---- however it is computed

LIMIT = 5
GRAMMARS = ["", write.grammar(write.choice_body(["yes", "no"]), after_thinking=True)]


def requests() -> list[GenerationRequest]:
    prompts: list[Any] = [[5, 900, 77], [50, make_image(1, (1, 6, 8)), 70], list(range(100, 130)), [9]]
    return [
        make_request(
            prompt,
            f"t{i}",
            max_tokens=24,
            temperature=1.2,
            seed=i,
            grammar=GRAMMARS[i % 2],
            thinking=limit_of(LIMIT),
            ignore_eos=False,
            min_tokens=LIMIT + 1,
        )
        for i, prompt in enumerate(prompts)
    ]


@pytest.fixture(scope="module")
def expected() -> dict[str, list[int]]:
    out: dict[str, list[int]] = {}
    for request in requests():
        out |= answers(*make_worker(enable_prefix_cache=False, max_batch_tokens=1024), [request])
    return out


def test_thoughts_end_and_grammars_hold_behind_them(expected: dict[str, list[int]]) -> None:
    ending = ids("\n</think>\n\n")
    for i, tokens in enumerate(expected.values()):
        patience = next(n for n in itertools.count() if tuple(tokens[LIMIT + n :][: len(ending)]) == ending)
        assert patience <= 3 * (i % 2)  # a grammar lets a character be finished
        if i % 2:
            assert tiny_tokenizer().decode(tokens).partition("</think>")[2].strip("\n") in ("yes", "no")


def test_a_limit_that_is_not_reached_changes_nothing() -> None:
    free = [dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, thinking=None)) for r in requests()]
    wide = [dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, thinking=limit_of(24))) for r in requests()]
    assert answers(*make_worker(), free) == answers(*make_worker(), wide)


def test_chunks_and_batches_change_nothing(expected: dict[str, list[int]]) -> None:
    assert answers(*make_worker(max_batch_tokens=3), requests()) == expected


def test_preemption_changes_nothing(expected: dict[str, list[int]]) -> None:
    worker, outcomes = make_worker(num_blocks=20, reserve_output_tokens=0, enable_prefix_cache=False)
    assert answers(worker, outcomes, requests()) == expected
    assert worker.engine.counters.preemptions > 0


@pytest.mark.parametrize("cut", range(LIMIT - 1, LIMIT + 6))
def test_continuing_elsewhere_changes_nothing(expected: dict[str, list[int]], cut: int) -> None:
    worker, outcomes = make_worker()
    whole = [r for r in requests() if len(expected[r.request_id]) > cut]
    replays = [dataclasses.replace(r, output_token_ids=tuple(expected[r.request_id][:cut])) for r in whole]
    for r in replays:
        outcomes.tokens[r.request_id] = list(r.output_token_ids)
    assert answers(worker, outcomes, replays) == {r.request_id: expected[r.request_id] for r in whole}


@pytest.mark.parametrize("max_tokens", [0, 1, LIMIT])
def test_a_handover_changes_nothing(max_tokens: int) -> None:
    """With 0 the first forced token is prefill's, the next one decode's."""
    some = [
        dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, thinking=limit_of(max_tokens)))
        for r in requests()
    ]
    with Path() as path:
        assert path.run(some) == answers(*make_worker(), some)
