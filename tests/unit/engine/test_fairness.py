"""Nobody stands in another's way: giant prompts and short ones, and answers beyond those that may run; the scheduler alone."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_cluster.engine.block_pool import BlockPool
from ernie_cluster.engine.scheduler import Schedule, Scheduler
from ernie_cluster.engine.sequence import Sequence
from tests.tiny import make_request

BLOCK = 16


def a_scheduler(max_batch_tokens: int = 64, max_num_seqs: int = 8, num_blocks: int = 50_000) -> Scheduler:
    return Scheduler(
        BlockPool(num_blocks, BLOCK, enable_prefix_cache=False),
        max_batch_tokens=max_batch_tokens,
        max_num_seqs=max_num_seqs,
    )


def prompt(scheduler: Scheduler, name: str, num_tokens: int, priority: int = 0) -> Sequence:
    """One whose blocks are leased, as all are that come."""
    request = replace(make_request([1] * num_tokens, name, max_tokens=1), priority=priority)
    blocks = scheduler.pool.allocate(scheduler.pool.num_blocks_for(num_tokens + 1))
    sequence = Sequence(request, [], blocks=blocks, is_prefill_only=True)
    scheduler.add(sequence)
    return sequence


def answer(scheduler: Scheduler, name: str, num_left: int) -> Sequence:
    """One whose prompt was computed elsewhere."""
    request = make_request([1] * 4, name, max_tokens=num_left + 1)
    sequence = Sequence(request, [], blocks=scheduler.pool.allocate(1), num_computed=4, tokens=[1] * 5)
    scheduler.add(sequence)
    return sequence


def step(scheduler: Scheduler) -> Schedule:
    """Schedule and apply; prompts that are done leave, and answers that are long enough."""
    schedule = scheduler.schedule()
    assert schedule.num_tokens <= scheduler.max_batch_tokens
    assert len(scheduler.running) <= scheduler.max_num_seqs
    for sequence, count in schedule.chunks:
        sequence.num_computed += count
        if not sequence.num_uncomputed:
            leave(scheduler, sequence)
    for sequence in schedule.decodes:
        sequence.num_computed += 1
        if sequence.append(1) is not None:
            leave(scheduler, sequence)
    return schedule


def leave(scheduler: Scheduler, sequence: Sequence) -> None:
    scheduler.remove(sequence)
    scheduler.pool.free(sequence.blocks)
    sequence.blocks = []


@given(giants=st.integers(1, 4), num_tokens=st.integers(1, 200), budget=st.integers(2, 64))
@settings(max_examples=20)
def test_a_short_prompt_behind_giants_takes_as_if_half_of_the_engine_were_its_own(
    giants: int, num_tokens: int, budget: int
) -> None:
    scheduler = a_scheduler(budget)
    for number in range(giants):
        prompt(scheduler, f"giant-{number}", 20_000)
    step(scheduler)
    short = prompt(scheduler, "short", num_tokens)
    steps = 0
    while short.num_uncomputed:
        step(scheduler)
        steps += 1
    assert steps <= -(-num_tokens // (budget // 2))


@given(lengths=st.lists(st.integers(1, 150), min_size=20, max_size=40), budget=st.integers(2, 64))
@settings(max_examples=50)
def test_a_giant_among_short_prompts_that_never_end_gets_half_of_the_engine(lengths: list[int], budget: int) -> None:
    scheduler = a_scheduler(budget)
    giant = prompt(scheduler, "giant", budget * 10)
    steps = 0
    while giant.num_uncomputed:
        prompt(scheduler, f"short-{steps}", lengths[steps % len(lengths)])
        step(scheduler)
        steps += 1
    assert steps <= 20


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(-1, 1)), min_size=1, max_size=8), st.integers(1, 64))
@settings(max_examples=50)
def test_no_token_of_a_step_is_left_while_anybody_wants_it(prompts: list[tuple[int, int]], budget: int) -> None:
    scheduler = a_scheduler(budget)
    sequences = [prompt(scheduler, f"r{i}", n, priority) for i, (n, priority) in enumerate(prompts)]
    while left := sum(s.num_uncomputed for s in sequences):
        assert step(scheduler).num_tokens == min(left, budget)
    assert not scheduler.running
    assert not scheduler.waiting


def test_prompts_that_fit_are_read_in_the_order_in_which_they_came() -> None:
    scheduler = a_scheduler(64)
    first, second, third = (prompt(scheduler, name, 40) for name in "abc")
    assert step(scheduler).chunks == [(first, 40), (second, 24)]
    assert step(scheduler).chunks == [(second, 16), (third, 40)]


def test_an_urgent_prompt_comes_before_one_that_is_being_read() -> None:
    scheduler = a_scheduler(64)
    batch = prompt(scheduler, "batch", 1000, priority=1)
    step(scheduler)
    urgent = prompt(scheduler, "urgent", 60)
    assert step(scheduler).chunks == [(urgent, 60), (batch, 4)]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=20), st.integers(1, 4))
@settings(max_examples=50)
def test_answers_beyond_those_that_may_run_wait_with_their_kv_and_all_end(lengths: list[int], most: int) -> None:
    scheduler = a_scheduler(max_num_seqs=most)
    answers = [answer(scheduler, f"r{i}", n) for i, n in enumerate(lengths)]
    assert [s in scheduler.running for s in answers] == [i < most for i in range(len(answers))]
    order = list[Sequence]()
    for _ in range(sum(lengths)):
        schedule = step(scheduler)
        assert not schedule.preempted
        order += [s for s in schedule.decodes if s not in order]
    assert order == answers, "one was overtaken"
    assert all(s.num_output == s.request.sampling.max_tokens for s in answers)
    assert scheduler.pool.num_used == 0


def test_who_waits_with_his_kv_gives_way_before_those_that_run() -> None:
    scheduler = a_scheduler(max_num_seqs=1, num_blocks=3)
    runs, waits = answer(scheduler, "runs", 40), answer(scheduler, "waits", 40)
    for _ in range(11):
        assert not step(scheduler).preempted
    assert runs.num_computed == 15
    step(scheduler)
    assert step(scheduler).preempted == [waits]
    assert waits.blocks == []
    assert runs in scheduler.running
