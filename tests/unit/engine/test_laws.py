"""Laws of the engine, on the tiny model in float32: how tokens are computed never changes which tokens."""

from __future__ import annotations

import dataclasses

import pytest

from ernie_cluster.engine.worker import Worker
from ernie_cluster.request import GenerationRequest, MediaInput
from tests import tiny
from tests.tiny import Outcomes, make_image, make_request, make_worker, run_mixed

PROMPTS: list[list[int | MediaInput]] = [
    [5, 900, 77, 1040, 12],
    [50, make_image(1, (1, 6, 8)), 70, 80, 90],
    list(range(100, 140)),
    [50, make_image(2), 60, make_image(3, (1, 2, 4)), 70],
    [9],
    [50, make_image(4, (4, 4, 4)), 11],
]
SAMPLING = [
    {},
    {"temperature": 0.8, "seed": 3},
    {"temperature": 1.3, "top_p": 0.9, "top_k": 40, "seed": 4},
    {"temperature": 1.0, "min_p": 0.02, "seed": 5, "repetition_penalty": 1.2},
    {"presence_penalty": 0.7, "frequency_penalty": 0.3, "logit_bias": ((77, 4.0),)},
    {"temperature": 0.6, "seed": 6, "min_tokens": 3},
]


def requests(max_tokens: int = 10) -> list[GenerationRequest]:
    return [
        make_request(prompt, request_id=f"law-{i}", max_tokens=max_tokens, **sampling)
        for i, (prompt, sampling) in enumerate(zip(PROMPTS, SAMPLING, strict=True))
    ]


def answers(worker: Worker, outcomes: Outcomes, some: list[GenerationRequest]) -> dict[str, list[int]]:
    run_mixed(worker, some)
    outcomes.drain()
    assert not outcomes.errors
    assert worker.pool.num_used == 0
    return outcomes.tokens


@pytest.fixture(scope="module")
def expected() -> dict[str, list[int]]:
    """Each prompt alone, in one step, without a cache."""
    out: dict[str, list[int]] = {}
    for request in requests():
        worker, outcomes = make_worker(enable_prefix_cache=False, max_batch_tokens=1024)
        out |= answers(worker, outcomes, [request])
    return out


def test_batch_equals_singles(expected: dict[str, list[int]]) -> None:
    assert answers(*make_worker(max_batch_tokens=1024), requests()) == expected


@pytest.mark.parametrize("budget", [1, 3, 7, 16])
def test_chunked_equals_one_shot(expected: dict[str, list[int]], budget: int) -> None:
    assert answers(*make_worker(max_batch_tokens=budget), requests()) == expected


def test_prefix_hit_equals_miss(expected: dict[str, list[int]]) -> None:
    worker, outcomes = make_worker()
    answers(worker, outcomes, requests())
    again, got = requests(), {}
    outcomes.tokens.clear()
    outcomes.reasons.clear()
    for request in again:
        worker.open_prefill(request, 1, None)
        got[request.request_id] = worker.engine.sequences[request.request_id].num_cached
        tiny.give_embeds(worker, request)
    while worker.engine.step():
        worker.check()
    outcomes.drain()
    assert outcomes.tokens == expected
    assert got["law-2"] == 36  # 40 tokens: nine full blocks; the last is computed for its logits
    assert got["law-1"] > 0


def test_prefix_cache_tells_pictures_apart() -> None:
    """Two prompts of equal token ids and different pictures share nothing from the picture on."""
    worker, outcomes = make_worker()
    first = make_request([50, make_image(1, (1, 8, 8)), 70], "a")
    second = make_request([50, make_image(2, (1, 8, 8)), 70], "b")
    assert (first.prompt_token_ids == second.prompt_token_ids).all()
    run_mixed(worker, [first])
    worker.open_prefill(second, 0, None)
    assert worker.engine.sequences["b"].num_cached == 0
    worker.abort("b")
    worker.engine.step()
    salted = dataclasses.replace(first, request_id="c", cache_salt=b"another tenant")
    worker.open_prefill(salted, 0, None)
    assert worker.engine.sequences["c"].num_cached == 0
    same = dataclasses.replace(first, request_id="d")
    worker.open_prefill(same, 0, None)
    assert worker.engine.sequences["d"].num_cached > 0
    outcomes.drain()


def test_preemption_changes_nothing(expected: dict[str, list[int]]) -> None:
    """So few blocks that sequences must give theirs back and be computed again."""
    worker, outcomes = make_worker(num_blocks=34, reserve_output_tokens=0, enable_prefix_cache=False)
    got = answers(worker, outcomes, requests())
    assert worker.engine.counters.preemptions > 0
    assert got == expected


def test_continuing_elsewhere_gives_the_same_tokens(expected: dict[str, list[int]]) -> None:
    """A request is a value: whoever gets the tokens so far goes on with the same ones, chance included."""
    for cut in (1, 4, 9):
        worker, outcomes = make_worker()
        replays = [dataclasses.replace(r, output_token_ids=tuple(expected[r.request_id][:cut])) for r in requests()]
        for r in replays:
            outcomes.tokens[r.request_id] = list(r.output_token_ids)
        assert answers(worker, outcomes, replays) == expected


def test_unequal_seeds_differ() -> None:
    worker, outcomes = make_worker()
    run_mixed(worker, [make_request([5, 6, 7], f"s{i}", temperature=1.5, seed=i) for i in range(4)])
    outcomes.drain()
    assert len({tuple(t) for t in outcomes.tokens.values()}) == 4


def test_stop_reasons() -> None:
    worker, outcomes = make_worker()
    run_mixed(worker, [make_request([5, 900, 77], "free", max_tokens=6)])
    outcomes.drain()
    tokens = outcomes.tokens["free"]
    third = tokens[2]
    first_time = tokens.index(third)
    run_mixed(worker, [make_request([5, 900, 77], "stop", max_tokens=6, stop_token_ids=(third,))])
    run_mixed(worker, [make_request([5, 900, 77], "late", max_tokens=6, stop_token_ids=(third,), min_tokens=5)])
    outcomes.drain()
    assert outcomes.tokens["stop"] == tokens[: first_time + 1]
    assert outcomes.reasons["stop"] == "stop"
    assert outcomes.reasons["free"] == "length"
    assert third not in outcomes.tokens["late"][:5]


def test_abort_frees_blocks_within_a_step() -> None:
    worker, outcomes = make_worker()
    worker.open_prefill(make_request([1, 2, 3], "a", max_tokens=100), 0, None)
    worker.engine.step()
    worker.engine.step()
    assert worker.pool.num_used > 0
    assert worker.abort("a")
    worker.engine.step()
    assert worker.pool.num_used == 0
    outcomes.drain()
    assert not outcomes.reasons
    assert not worker.abort("a")


def test_deadline_ends_a_request() -> None:
    worker, outcomes = make_worker()
    now = [0.0]
    worker.engine.clock = lambda: now[0]
    request = dataclasses.replace(make_request([1, 2, 3], "a", max_tokens=100), timeout_s=5.0)
    worker.open_prefill(request, 0, None)
    worker.engine.step()
    now[0] = 5.1
    worker.engine.step()
    outcomes.drain()
    assert "5 s" in str(outcomes.errors["a"])
    assert worker.pool.num_used == 0


def test_prompt_without_its_picture_waits_and_holds_up_nobody() -> None:
    worker, outcomes = make_worker()
    worker.open_prefill(make_request([9, make_image(1), 8], "blind"), 0, None)
    worker.open_prefill(make_request([1, 2, 3], "text"), 0, None)
    while worker.engine.step():
        pass
    outcomes.drain()
    assert outcomes.reasons == {"text": "length"}
    assert worker.engine.sequences["blind"].num_computed == 2  # what stands before the picture is done already


def test_a_chat_goes_on_from_its_answers(expected: dict[str, list[int]]) -> None:
    """Blocks with tokens of an answer are found again, and say what computed ones say."""

    def next_turn(request: GenerationRequest) -> GenerationRequest:
        prompt, n = PROMPTS[int(request.request_id[-1])], request.request_id[-1]
        return make_request([*prompt, *expected[request.request_id], 3, 4], f"turn-{n}", max_tokens=6)

    turns = [next_turn(r) for r in requests()]
    worker, outcomes = make_worker(max_batch_tokens=64)
    answers(worker, outcomes, requests())
    computed = worker.snapshot().prompt_tokens
    answers(worker, outcomes, turns)
    assert {t.request_id: outcomes.tokens[t.request_id] for t in turns} == answers(
        *make_worker(max_batch_tokens=1024, enable_prefix_cache=False), turns
    )
    # of each the end: the token whose KV nobody needed, a part of a block, and what is new
    assert worker.snapshot().prompt_tokens - computed <= len(turns) * (1 + tiny.BLOCK_SIZE - 1 + 2)
