"""The scheduler inside a whole engine, on the toy model, through random histories; test_preemption.py has its corners."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ernie_cluster.engine.scheduler import Schedule
from ernie_cluster.engine.sequence import Status
from ernie_cluster.engine.worker import Worker
from ernie_cluster.errors import ContextTooLong, Evicted, Overloaded
from ernie_cluster.request import GenerationRequest, MediaInput
from tests.tiny import make_request
from tests.unit.engine.toy import Elsewhere, ManualChannel, answer, give_pictures, picture, steps_until_idle, toy_worker


def watch(worker: Worker) -> list[Schedule]:
    """The schedules that a worker makes from now on, each held to the scheduler's promises."""
    scheduler, seen = worker.engine.scheduler, []
    decide = scheduler.schedule

    def checked() -> Schedule:
        before = set(scheduler.running)
        schedule = decide()
        sequences = [*schedule.decodes, *(s for s, _ in schedule.chunks)]
        assert schedule.num_tokens <= scheduler.max_batch_tokens
        assert len(scheduler.running) <= scheduler.max_num_seqs
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
        for sequence in schedule.preempted:
            kept = [s for s in scheduler.running if not s.is_prefill_only]
            assert all(s.request.priority <= sequence.request.priority for s in kept), "a more urgent one gave way"
        for sequence in set(scheduler.running) - before:
            could_start = [s for s in scheduler.waiting if s.blocks and s.num_ready]
            assert all(s.request.priority >= sequence.request.priority for s in could_start), "one was overtaken"
        seen.append(schedule)
        return schedule

    scheduler.schedule = checked  # type: ignore[method-assign]
    return seen


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
        priority=st.integers(-1, 1),
    )
    def open(self, prompt: str, max_tokens: int, images: list[int], is_prefill_only: bool, priority: int) -> None:
        items: list[int | MediaInput] = [ord(letter) for letter in prompt]
        for seed in images:
            items.insert(seed, picture(seed, (1, 2, 2 * seed)))
        request = replace(make_request(items, f"r{len(self.requests)}", max_tokens=max_tokens), priority=priority)
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
