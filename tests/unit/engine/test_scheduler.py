"""The scheduler inside a whole engine, on the toy model: random histories, and the corners where one could hang."""

from __future__ import annotations

import functools
import threading

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ernie_cluster.engine.block_pool import BlockPool
from ernie_cluster.engine.scheduler import Schedule, Scheduler
from ernie_cluster.engine.sequence import Sequence, Status
from ernie_cluster.engine.worker import Worker
from ernie_cluster.errors import ContextTooLong, Evicted, Overloaded
from ernie_cluster.request import GenerationRequest, MediaInput
from ernie_cluster.transport.base import Message, PieceHeader, Reply
from tests.tiny import Outcomes, make_image, make_request
from tests.unit.engine.toy import ManualChannel, answer, picture_pieces, toy_worker

picture = functools.cache(make_image)
"""Pictures take a while to draw."""


class Elsewhere:
    """A decode replica's sink: room for everything, until the test answers."""

    def __init__(self) -> None:
        self.commits: dict[str, Reply] = {}

    def accept(self, header: PieceHeader, payload: object) -> None:
        """Everything is welcome."""

    def handle(self, message: Message, reply: Reply) -> None:
        if message["type"] == "claim":
            reply({"cached_blocks": 0})
        else:
            self.commits[str(message["request_id"])] = reply

    def disconnected(self, peer: str) -> None:
        raise AssertionError("nobody closes")


def watch(worker: Worker) -> list[Schedule]:
    """The schedules that a worker makes from now on, each held to the scheduler's promises."""
    scheduler, seen = worker.engine.scheduler, []
    decide = scheduler.schedule

    def checked() -> Schedule:
        schedule = decide()
        sequences = [*schedule.decodes, *(s for s, _ in schedule.chunks)]
        assert schedule.num_tokens <= scheduler.max_batch_tokens
        assert len(sequences) <= scheduler.max_num_seqs
        assert len(set(sequences)) == len(sequences)
        for sequence in sequences:
            assert sequence.status is Status.RUNNING
            assert sequence in scheduler.running
        for sequence in schedule.decodes:
            assert sequence.num_computed == len(sequence.tokens) - 1 >= sequence.num_prompt
        for sequence, count in schedule.chunks:
            assert 0 < count <= sequence.num_ready
        for sequence, count in (*((s, 1) for s in schedule.decodes), *schedule.chunks):
            assert len(sequence.blocks) * scheduler.pool.block_size >= sequence.num_computed + count
        assert not any(s.is_prefill_only or s in sequences or s.blocks for s in schedule.preempted)
        seen.append(schedule)
        return schedule

    scheduler.schedule = checked  # type: ignore[method-assign]
    return seen


def give_pictures(worker: Worker, request: GenerationRequest) -> None:
    """The pictures that a request waits for arrive, if it is here still."""
    sequence = worker.engine.sequences.get(request.request_id)
    for index in sorted(sequence.awaited_media if sequence is not None else ()):
        for piece in picture_pieces(request, index, 0, 1):
            worker.inbox.accept(*piece)


def steps_until_idle(worker: Worker, bound: int) -> int:
    """Step while there is something to run; the number of steps."""
    for count in range(bound):
        if not worker.engine.step():
            return count
        worker.check()
    raise AssertionError(f"still running after {bound} steps")


class EngineMachine(RuleBasedStateMachine):
    """Requests of every kind come, wait for pictures, are handed over, aborted and preempted; all of them end."""

    @initialize(
        num_blocks=st.integers(4, 16),
        block_size=st.integers(1, 4),
        max_num_seqs=st.integers(1, 4),
        spare_tokens=st.integers(0, 8),
        reserve=st.integers(0, 3),
        has_cache=st.booleans(),
    )
    def start(
        self, num_blocks: int, block_size: int, max_num_seqs: int, spare_tokens: int, reserve: int, has_cache: bool
    ) -> None:
        self.worker, self.outcomes = toy_worker(
            num_blocks,
            block_size,
            max_num_seqs=max_num_seqs,
            max_batch_tokens=max_num_seqs + spare_tokens,
            reserve_output_tokens=reserve,
            enable_prefix_cache=has_cache,
        )
        watch(self.worker)
        self.decode = Elsewhere()
        self.channel = ManualChannel(self.decode)
        self.requests: dict[str, GenerationRequest] = {}
        self.to_hand_over: set[str] = set()
        self.aborted: set[str] = set()
        self.blind: set[str] = set()
        self.num_leases = 0

    @rule(
        prompt=st.text("ab", min_size=1, max_size=12),
        max_tokens=st.integers(1, 10),
        images=st.lists(st.integers(1, 3), max_size=2),
        is_prefill_only=st.booleans(),
    )
    def open(self, prompt: str, max_tokens: int, images: list[int], is_prefill_only: bool) -> None:
        items: list[int | MediaInput] = [ord(letter) for letter in prompt]
        for seed in images:
            items.insert(seed, picture(seed, (1, 2, 2 * seed)))
        request = make_request(items, f"r{len(self.requests)}", max_tokens=max_tokens)
        try:
            self.worker.open_prefill(request, 0, self.channel if is_prefill_only else None)
        except Overloaded:
            return
        except ContextTooLong:
            assert self.worker.pool.num_blocks_for(request.num_prompt_tokens) > self.worker.pool.num_blocks - 1
            return
        self.channel.deliver_all()
        self.requests[request.request_id] = request
        if is_prefill_only:
            self.to_hand_over.add(request.request_id)
        if images:
            self.blind.add(request.request_id)

    @rule(num_tokens=st.integers(1, 16))
    def lease(self, num_tokens: int) -> None:
        """Blocks go to somebody whose KV has not come."""
        try:
            self.worker.leases.grant(f"lease-{self.num_leases}", 0, num_tokens, [], 0, 0.0)
        except (Overloaded, ContextTooLong):
            return
        self.num_leases += 1

    @precondition(lambda self: self.num_leases)
    @rule()
    def end_lease(self) -> None:
        self.num_leases -= 1
        assert self.worker.leases.end(f"lease-{self.num_leases}")

    @rule(times=st.integers(1, 5))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.worker.engine.step()
            self.worker.check()
        self.channel.deliver_all()

    @precondition(lambda self: self.blind)
    @rule(data=st.data())
    def pictures_arrive(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.blind)))
        self.blind.remove(request_id)
        give_pictures(self.worker, self.requests[request_id])

    @precondition(lambda self: self.decode.commits)
    @rule(data=st.data())
    def confirm(self, data: st.DataObject) -> None:
        self.decode.commits.pop(data.draw(st.sampled_from(sorted(self.decode.commits))))({})

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.requests)))
        if self.worker.abort(request_id):
            self.aborted.add(request_id)

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "worker"):
            assert self.worker.check()

    def teardown(self) -> None:
        """Whatever happened: once pictures, confirmations and blocks come, everybody ends, and rightly."""
        if not hasattr(self, "worker"):
            return
        for number in range(self.num_leases):
            assert self.worker.leases.end(f"lease-{number}")
        bound = 10 + 4 * sum(r.max_total_tokens for r in self.requests.values()) * (1 + len(self.requests))
        for request_id in sorted(self.blind):
            give_pictures(self.worker, self.requests[request_id])
        steps_until_idle(self.worker, bound)
        self.channel.deliver_all()
        for reply in self.decode.commits.values():
            reply({})
        steps_until_idle(self.worker, bound)
        self.worker.engine.step()
        assert not self.worker.engine.sequences
        assert self.worker.pool.num_used == 0
        self.outcomes.drain()
        for request_id, request in self.requests.items():
            self.check_outcome(request_id, answer(request))

    def check_outcome(self, request_id: str, expected: list[int]) -> None:
        tokens, error = self.outcomes.tokens.get(request_id, []), self.outcomes.errors.get(request_id)
        if request_id in self.to_hand_over:
            expected = expected[:1]
        assert tokens == expected[: len(tokens)]
        if request_id in self.aborted:
            return
        if isinstance(error, ContextTooLong):
            num_tokens = self.requests[request_id].num_prompt_tokens + len(tokens)
            assert self.worker.pool.num_blocks_for(num_tokens) > self.worker.pool.num_blocks - 1
        elif error is None:
            assert tokens == expected
        else:
            assert isinstance(error, Evicted)
            assert self.requests[request_id].media


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(
    max_examples=120, stateful_step_count=30, suppress_health_check=[HealthCheck.too_slow], deadline=None
)


def open_mixed(worker: Worker, prompt: list[int | MediaInput], request_id: str, max_tokens: int) -> GenerationRequest:
    request = make_request(prompt, request_id, max_tokens=max_tokens)
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
