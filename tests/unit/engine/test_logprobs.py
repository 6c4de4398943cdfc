"""Log-probabilities: the model's own, equal to transformers', and the same however the tokens were computed."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ernie_cluster.engine.worker import Worker
from ernie_cluster.request import GenerationRequest, TokenLogprobs
from tests.tiny import Outcomes, make_request, make_worker, run_mixed
from tests.unit.engine import test_laws
from tests.unit.engine.test_handover import Path
from tests.unit.model.test_parity import PROMPTS, reference, reference_inputs

TOLERANCE = 1e-4
COUNTS = [0, 3, 20, None, 1, 5]
"""What the requests of the laws ask for."""

Reports = dict[str, list[TokenLogprobs]]


def requests() -> list[GenerationRequest]:
    return [
        dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, num_logprobs=count))
        for r, count in zip(test_laws.requests(6), COUNTS, strict=True)
    ]


def reports(worker: Worker, outcomes: Outcomes, some: list[GenerationRequest]) -> Reports:
    run_mixed(worker, some)
    outcomes.drain()
    assert not outcomes.errors
    return outcomes.logprobs


def assert_same(got: Reports, expected: Reports) -> None:
    assert got.keys() == expected.keys()
    for key, rows in expected.items():
        assert [len(r.top) for r in got[key]] == [len(r.top) for r in rows]
        for ours, theirs in zip(got[key], rows, strict=True):
            assert [i for i, _ in ours.top] == [i for i, _ in theirs.top]
            values = [(r.chosen, *(value for _, value in r.top)) for r in (ours, theirs)]
            assert values[0] == pytest.approx(values[1], abs=TOLERANCE)


@pytest.fixture(scope="module")
def expected() -> Reports:
    """Each prompt alone."""
    out: Reports = {}
    for request in requests():
        out |= reports(*make_worker(enable_prefix_cache=False, max_batch_tokens=1024), [request])
    return out


def test_everyone_gets_what_was_asked_for(expected: Reports) -> None:
    for request, count in zip(requests(), COUNTS, strict=True):
        rows = expected[request.request_id]
        assert [len(r.top) for r in rows] == ([] if count is None else [count] * request.sampling.max_tokens)
        assert all([v for _, v in r.top] == sorted((v for _, v in r.top), reverse=True) for r in rows)


@pytest.mark.parametrize("name", ["text", "two images"])
def test_they_equal_transformers_whatever_shapes_the_choice(name: str) -> None:
    request = make_request(
        PROMPTS[name],
        max_tokens=8,
        num_logprobs=20,
        temperature=1.5,
        top_k=50,
        repetition_penalty=1.5,
        frequency_penalty=1.0,
        logit_bias=((77, 5.0),),
        min_tokens=8,
    )
    worker, outcomes = make_worker()
    rows = reports(worker, outcomes, [request])[request.request_id]
    tokens = outcomes.tokens[request.request_id]
    inputs = reference_inputs(request)
    count = len(tokens)
    after = inputs["position_ids"].max() + 1 + torch.arange(count)
    inputs["position_ids"] = torch.cat([inputs["position_ids"], after.expand(3, 1, count)], 2)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([tokens])], 1)
    for key in ("mm_token_type_ids", "moe_mm_token_type_ids"):
        inputs[key] = torch.cat([inputs[key], torch.zeros(1, count, dtype=torch.long)], 1)
    with torch.no_grad():
        logprobs = reference()(**inputs).logits[0, request.num_prompt_tokens - 1 : -1].log_softmax(-1)
    for row, token, theirs in zip(rows, tokens, logprobs, strict=True):
        top = theirs.topk(20).values.tolist()
        same = [theirs[i].item() for i, _ in row.top]
        assert row.chosen == pytest.approx(theirs[token].item(), rel=TOLERANCE, abs=TOLERANCE)
        assert [value for _, value in row.top] == pytest.approx(top, rel=TOLERANCE, abs=TOLERANCE)
        assert [value for _, value in row.top] == pytest.approx(same, rel=TOLERANCE, abs=TOLERANCE)


def test_batch_equals_singles(expected: Reports) -> None:
    assert_same(reports(*make_worker(max_batch_tokens=1024), requests()), expected)


def test_chunked_equals_one_shot(expected: Reports) -> None:
    assert_same(reports(*make_worker(max_batch_tokens=3), requests()), expected)


def test_preemption_changes_nothing(expected: Reports) -> None:
    worker, outcomes = make_worker(num_blocks=30, reserve_output_tokens=0, enable_prefix_cache=False)
    assert_same(reports(worker, outcomes, requests()), expected)
    assert worker.engine.counters.preemptions > 0


def test_continuing_elsewhere_reports_the_rest(expected: Reports) -> None:
    first, outcomes = make_worker()
    run_mixed(first, requests())
    outcomes.drain()
    worker, later = make_worker()
    replays = [dataclasses.replace(r, output_token_ids=tuple(outcomes.tokens[r.request_id][:2])) for r in requests()]
    for r in replays:
        later.tokens[r.request_id] = list(r.output_token_ids)
    assert_same(reports(worker, later, replays), {key: rows[2:] for key, rows in expected.items()})


def test_three_workers_report_what_one_reports(expected: Reports) -> None:
    with Path() as path:
        path.run(requests())
        got = {key: rows + path.decoded.logprobs[key] for key, rows in path.prefilled.logprobs.items()}
    assert_same(got, expected)
