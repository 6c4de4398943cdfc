"""When blocks run out: who gives way, who waits for whom, and that nobody waits for ever; on the toy model."""

from __future__ import annotations

import threading
from collections.abc import Sequence as Seq
from dataclasses import replace

import pytest

from ernie_cluster.engine.block_pool import BlockPool
from ernie_cluster.engine.scheduler import Scheduler
from ernie_cluster.engine.sequence import Sequence, Status
from ernie_cluster.engine.worker import Worker
from ernie_cluster.errors import ContextTooLong, Evicted, Overloaded
from ernie_cluster.request import GenerationRequest, MediaInput
from tests.tiny import Outcomes, make_request
from tests.unit.engine.toy import Elsewhere, ManualChannel, answer, give_pictures, picture, steps_until_idle, toy_worker


def open_mixed(
    worker: Worker, prompt: list[int | MediaInput], request_id: str, max_tokens: int, priority: int = 0
) -> GenerationRequest:
    request = replace(make_request(prompt, request_id, max_tokens=max_tokens), priority=priority)
    worker.open_prefill(request, 0, None)
    return request


def held_to(outcomes: Outcomes, requests: list[GenerationRequest]) -> None:
    """Each answer is whole and right."""
    outcomes.drain()
    assert not outcomes.errors
    for request in requests:
        assert outcomes.tokens[request.request_id] == answer(request)


def test_a_sequence_that_outgrows_the_whole_cache_ends_with_an_error() -> None:
    worker, outcomes = toy_worker(5, 4)
    request = open_mixed(worker, [1, 2, 3], "a", 100)
    steps_until_idle(worker, 30)
    outcomes.drain()
    error = outcomes.errors["a"]
    assert isinstance(error, ContextTooLong)
    assert str(error) == "request a: 17 tokens need 5 KV blocks, this replica has 4; lower max_tokens"
    assert outcomes.tokens["a"] == answer(request)[:14]
    assert worker.pool.num_used == 0


def test_sequences_that_together_outgrow_the_cache_all_end() -> None:
    worker, outcomes = toy_worker(7, 4, reserve_output_tokens=0)
    requests = [open_mixed(worker, [i, 5, 6], f"r{i}", 20) for i in range(4)]
    steps_until_idle(worker, 400)
    assert worker.engine.counters.preemptions > 0
    held_to(outcomes, requests)


def test_a_preempted_sequence_does_not_hold_up_those_that_have_their_blocks() -> None:
    """`grows` gives its blocks back, and the rest is leased to `later`: who must run for `grows` to ever come back."""
    worker, outcomes = toy_worker(5, 4, reserve_output_tokens=0)
    grows = open_mixed(worker, [1, 2, 3, 4], "grows", 6)
    worker.engine.step()
    later = open_mixed(worker, list(range(12)), "later", 1)
    steps_until_idle(worker, 60)
    assert worker.engine.counters.preemptions == 1
    held_to(outcomes, [grows, later])


def test_newcomers_leave_the_blocks_that_a_preempted_sequence_waits_for() -> None:
    worker, outcomes = toy_worker(7, 4, reserve_output_tokens=0)
    older = open_mixed(worker, [1, 2, 3], "older", 18)
    younger = open_mixed(worker, [4, 5, 6], "younger", 18)
    while not worker.engine.counters.preemptions:
        worker.engine.step()
    assert worker.pool.num_free > 0
    assert worker.snapshot().free_blocks == 0
    with pytest.raises(Overloaded, match="spoken for"):
        open_mixed(worker, [7], "newcomer", 1)
    with pytest.raises(Overloaded, match="spoken for"):
        worker.open_decode(make_request([7], "newcomer"), 0)
    steps_until_idle(worker, 100)
    held_to(outcomes, [older, younger])


def test_a_picture_that_only_the_cache_knew_sends_a_preempted_sequence_elsewhere() -> None:
    """Its embeddings were never asked for, and the cached blocks are overwritten by the time they are needed."""
    worker, outcomes = toy_worker(12, 4, reserve_output_tokens=0)
    give_pictures(worker, open_mixed(worker, [7, picture(1, (1, 4, 4)), 8, 8], "first", 1))
    steps_until_idle(worker, 10)
    older = open_mixed(worker, [9, 9, 9], "older", 40)
    open_mixed(worker, [7, picture(1, (1, 4, 4)), 8, 8], "again", 40)
    assert not worker.engine.sequences["again"].awaited_media
    steps_until_idle(worker, 200)
    outcomes.drain()
    assert isinstance(outcomes.errors.pop("again"), Evicted)
    held_to(outcomes, [older])


def test_a_preempted_sequence_uses_the_pictures_that_came_for_it() -> None:
    worker, outcomes = toy_worker(9, 4, reserve_output_tokens=0, enable_prefix_cache=False)
    older = open_mixed(worker, [9, 9, 9], "older", 20)
    seeing = open_mixed(worker, [7, picture(1, (1, 4, 4)), 8], "seeing", 20)
    give_pictures(worker, seeing)
    steps_until_idle(worker, 100)
    assert worker.engine.counters.preemptions > 0
    held_to(outcomes, [older, seeing])


def test_blocks_on_their_way_to_another_replica_do_not_change_hands() -> None:
    worker, outcomes = toy_worker(4, 4, reserve_output_tokens=0, max_batch_tokens=6, max_num_seqs=2)
    decode = Elsewhere()
    channel = ManualChannel(decode)
    older = open_mixed(worker, [1, 2, 3, 4], "older", 6)
    worker.open_prefill(make_request(list(range(8)), "leaves"), 0, channel)
    channel.deliver_all()
    leaving = worker.engine.sequences["leaves"]
    blocks = list(leaving.blocks)
    worker.engine.step()
    assert (leaving.status, leaving.num_computed) == (Status.RUNNING, 2)
    steps_until_idle(worker, 20)
    channel.deliver_all()
    assert worker.engine.counters.preemptions == 1
    assert leaving.num_preemptions == 0
    assert (leaving.status, leaving.blocks) == (Status.HANDING_OVER, blocks)
    decode.commits["leaves"]({})
    steps_until_idle(worker, 20)
    assert worker.pool.num_used == 0
    outcomes.drain()
    assert outcomes.tokens["older"] == answer(older)


def test_those_who_wait_for_blocks_get_them_in_turn() -> None:
    """A small one does not slip past a large one for ever."""
    pool = BlockPool(7, 4)
    scheduler = Scheduler(pool, max_batch_tokens=64, max_num_seqs=4)
    large, small = (Sequence(make_request(range(n)), []) for n in (20, 4))
    scheduler.add(large)
    scheduler.add(small)
    others = pool.allocate(2)
    assert scheduler.num_blocks_owed == 6
    assert scheduler.schedule().num_tokens == 0
    pool.free(others)
    assert [s for s, _ in scheduler.schedule().chunks] == [large, small]


def test_cached_tokens_are_those_of_the_first_admission() -> None:
    """A preempted sequence finds its own blocks again; they are no gift of the cache."""
    worker, outcomes = toy_worker(7, 4, reserve_output_tokens=0)
    requests = [open_mixed(worker, [i, 5, 6, 7, 8], f"r{i}", 15) for i in range(2)]
    sequences = [worker.engine.sequences[r.request_id] for r in requests]
    steps_until_idle(worker, 100)
    assert sequences[1].num_preemptions > 0
    assert [s.num_cached for s in sequences] == [0, 0]
    held_to(outcomes, requests)


def test_an_engine_that_waits_for_others_blocks_pauses() -> None:
    """Else it would spin, with the lock in its hand."""
    worker, outcomes = toy_worker(5, 4, reserve_output_tokens=0)
    has_paused = threading.Event()
    wait = worker.engine.lock.wait

    def noted(timeout: float | None = None) -> bool:
        if worker.engine.has_work():
            has_paused.set()
        return wait(timeout)

    worker.engine.lock.wait = noted  # type: ignore[method-assign]
    request = open_mixed(worker, [1, 2, 3, 4], "a", 6)
    worker.leases.grant("other", 0, 12, [], 0, 0.0)
    worker.start()
    assert has_paused.wait(10.0)
    with worker.engine.lock:
        assert worker.leases.end("other")
    outcomes.wait_for(["a"])
    worker.stop()
    held_to(outcomes, [request])


def test_an_aborted_hand_over_is_no_work() -> None:
    """Its blocks are being read; there is nothing to do until the other side has answered."""
    worker, _ = toy_worker(5, 4)
    decode = Elsewhere()
    channel = ManualChannel(decode)
    worker.open_prefill(make_request([1, 2, 3], "a"), 0, channel)
    channel.deliver_all()
    worker.engine.step()
    channel.deliver_all()
    assert worker.abort("a")
    assert not worker.engine.has_work()
    assert worker.pool.num_used > 0
    decode.commits["a"]({})
    assert worker.pool.num_used == 0


# ---- who is urgent


def finishing_order(worker: Worker, outcomes: Outcomes, requests: Seq[GenerationRequest]) -> list[str]:
    steps_until_idle(worker, 400)
    held_to(outcomes, list(requests))
    return list(outcomes.reasons)


@pytest.mark.parametrize("priorities", [(0, 0, 0, 0), (3, 2, 1, 0), (0, 5, -5, 0), (1, 0, 1, 0)])
def test_those_who_wait_start_by_priority_and_then_by_arrival(priorities: tuple[int, ...]) -> None:
    worker, outcomes = toy_worker(40, 4, max_num_seqs=1)
    requests = [open_mixed(worker, [i, 5, 6], f"r{i}", 3, priority) for i, priority in enumerate(priorities)]
    wanted = sorted(requests, key=lambda r: r.priority)
    assert finishing_order(worker, outcomes, requests) == [r.request_id for r in wanted]


@pytest.mark.parametrize("urgent", range(4))
def test_the_most_urgent_keeps_its_blocks_whenever_it_came(urgent: int) -> None:
    worker, outcomes = toy_worker(7, 4, reserve_output_tokens=0)
    requests = [open_mixed(worker, [i, 5, 6], f"r{i}", 14, -(i == urgent)) for i in range(4)]
    sequences = list(worker.engine.sequences.values())
    assert finishing_order(worker, outcomes, requests)[0] == f"r{urgent}"
    assert worker.engine.counters.preemptions > 0
    assert sequences[urgent].num_preemptions == 0


def test_an_urgent_newcomer_ends_nobody_who_runs() -> None:
    worker, outcomes = toy_worker(40, 4, max_num_seqs=1)
    running = open_mixed(worker, [1, 2, 3], "running", 5)
    worker.engine.step()
    urgent = open_mixed(worker, [4, 5, 6], "urgent", 5, -100)
    assert finishing_order(worker, outcomes, [running, urgent]) == ["running", "urgent"]
