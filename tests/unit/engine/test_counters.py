"""What a worker tells of its work: laws over whole runs, and who counts as what at each stage."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_cluster.engine.worker import Worker
from tests.tiny import Outcomes, make_request
from tests.unit.engine.pair import PROMPT, STAGES, Pair, Stage, committed, committing, decoding
from tests.unit.engine.toy import steps_until_idle, toy_worker

BLOCK_SIZE = 4
ORDERS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=4)
"""(prompt tokens, output tokens) of requests."""


def open_all(worker: Worker, orders: list[tuple[int, int]]) -> None:
    for i, (prompt, output) in enumerate(orders):
        worker.open_prefill(make_request(range(10 + i, 10 + i + prompt), f"r{i}", max_tokens=output), 0, None)


def held_to_what_came_out(worker: Worker, outcomes: Outcomes, orders: list[tuple[int, int]]) -> None:
    """The worker's numbers against those of a client that counts tokens."""
    outcomes.drain()
    told = worker.snapshot()
    out = [len(outcomes.tokens.get(f"r{i}", [])) for i in range(len(orders))]
    answering = [n for (_, wanted), n in zip(orders, out, strict=True) if 0 < n < wanted]
    assert told.num_prompts == out.count(0)
    assert told.num_answers == len(answering)
    assert told.generated_tokens == sum(out)


@settings(max_examples=20, deadline=None)
@given(ORDERS)
def test_sums_over_a_run_are_what_was_asked_for(orders: list[tuple[int, int]]) -> None:
    worker, outcomes = toy_worker(80, BLOCK_SIZE, enable_prefix_cache=False)
    open_all(worker, orders)
    held_to_what_came_out(worker, outcomes, orders)
    while worker.engine.step():
        held_to_what_came_out(worker, outcomes, orders)
    told = worker.snapshot()
    assert told.has_read.n == len(orders)
    assert told.prompt_tokens == told.has_read.x == sum(p for p, _ in orders)
    assert told.has_read.xx == sum(p * p for p, _ in orders)
    assert told.generated_tokens == sum(n for _, n in orders)
    assert 0 < told.has_read.t + told.has_written.t <= told.run_s * (1 + 1e-9)


def test_steps_without_prompts_are_noted_by_the_kv_that_they_read() -> None:
    worker, _ = toy_worker(80, BLOCK_SIZE)
    open_all(worker, [(5, 4), (7, 3)])
    steps_until_idle(worker, 10)
    told = worker.snapshot()
    contexts = [6 + 8, 7 + 9, 8]  # one step reads both prompts, two write for both, the last for the longer answer
    assert (told.has_written.n, told.has_written.x, told.written) == (3, sum(contexts), 2 + 2 + 1)
    assert told.has_written.xx == sum(x * x for x in contexts)
    assert told.steps == 4


def test_what_a_cache_holds_is_not_read() -> None:
    worker, _ = toy_worker(80, BLOCK_SIZE)
    for request_id in ("a", "b"):
        worker.open_prefill(make_request(range(10, 20), request_id, max_tokens=2), 0, None)
        steps_until_idle(worker, 10)
    told = worker.snapshot()
    assert told.has_read.n == 2
    assert told.prompt_tokens == told.has_read.x == 10 + 2  # two blocks of four are shared


def test_a_preempted_sequence_is_read_again_and_counts_as_an_answer_meanwhile() -> None:
    orders = [(3, 20)] * 4
    worker, outcomes = toy_worker(7, BLOCK_SIZE, reserve_output_tokens=0, enable_prefix_cache=False)
    open_all(worker, orders)
    has_waited = False
    while worker.engine.step():
        outcomes.drain()
        told = worker.snapshot()
        assert told.num_prompts == sum(f"r{i}" not in outcomes.tokens for i in range(4))
        has_waited |= told.num_waiting > told.num_prompts
    told = worker.snapshot()
    assert has_waited
    assert told.generated_tokens == 4 * 20
    assert 4 < told.has_read.n <= 4 + told.preemptions
    assert told.has_read.x == told.prompt_tokens > 4 * 3


@pytest.mark.parametrize("stage", STAGES)
def test_a_request_is_a_prompt_here_until_its_kv_is_there_and_an_answer_there_from_the_start(stage: Stage) -> None:
    pair = Pair()
    request = make_request(PROMPT, "a", max_tokens=6)
    pair.open(request)
    stage(pair)
    sender, receiver = pair.prefill.snapshot(), pair.decode.snapshot()
    is_over = stage in (committed, decoding)
    assert (sender.num_prompts, sender.num_answers) == (0 if is_over else 1, 0)
    assert (receiver.num_prompts, receiver.num_answers) == (0, 1)
    if stage is committing:  # nothing runs, waits or is leased, and yet it must not be stopped
        assert (sender.num_running, sender.num_waiting, sender.num_leases) == (0, 0, 0)
    pair.run()
    sender, receiver = pair.prefill.snapshot(), pair.decode.snapshot()
    assert (sender.num_prompts, sender.num_answers, receiver.num_prompts, receiver.num_answers) == (0, 0, 0, 0)
    assert (sender.has_read.n, sender.has_read.x, sender.generated_tokens) == (1, len(PROMPT), 1)
    assert (receiver.has_read.n, receiver.prompt_tokens, receiver.generated_tokens) == (0, 0, 5)
    assert (sender.has_written.n, receiver.has_written.n) == (0, 5)


@pytest.mark.parametrize("stage", STAGES)
def test_an_aborted_request_counts_no_more(stage: Stage) -> None:
    pair = Pair()
    pair.open(make_request(PROMPT, "a", max_tokens=6))
    stage(pair)
    for worker in (pair.prefill, pair.decode):
        worker.abort("a")
    pair.run()
    for worker in (pair.prefill, pair.decode):
        told = worker.snapshot()
        assert (told.num_prompts, told.num_answers) == (0, 0)
