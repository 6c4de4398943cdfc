"""Random histories of hand-overs between two workers that both play every role, on the toy model.

Requests are tried again under new epochs while older attempts still run; pieces are lost, fail, or come late; leases
run out; clients leave. Whatever happens, no block has an owner that nobody knows, every token that anybody emits is
the right one, and every request ends.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ernie_cluster.engine.engine import Outcome
from ernie_cluster.engine.worker import Worker
from ernie_cluster.errors import ContextTooLong, Overloaded, ReplicaError, ReplicaLost, TransferFailed
from ernie_cluster.request import GenerationRequest, MediaInput, RequestFailed
from ernie_cluster.transport.base import Message
from tests.tiny import make_request
from tests.unit.engine.toy import ManualChannel, answer, picture, picture_pieces, toy_worker

LEASE_S = 10.0
PATHS = [(0, 1), (1, 0), (0, None), (1, None)]
"""(prefill, decode or None where one worker does both)."""


@dataclass(slots=True, eq=False)
class Client:
    """Who asked, and what has come."""

    request: GenerationRequest
    expected: list[int]
    epoch: int = -1
    path: tuple[int, int | None] = (0, None)
    tokens: dict[int, int] = field(default_factory=dict)
    has_failed: bool = False
    """The present attempt."""
    is_over: bool = False

    @property
    def so_far(self) -> tuple[int, ...]:
        out: list[int] = []
        while len(out) in self.tokens:
            out.append(self.tokens[len(out)])
        return tuple(out)


class HistoryMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(6, 20),
        block_size=st.integers(1, 4),
        budget=st.integers(3, 16),
        piece_blocks=st.integers(1, 4),
        has_cache=st.booleans(),
        host_blocks=st.integers(0, 20),
    )
    def start(
        self, num_blocks: int, block_size: int, budget: int, piece_blocks: int, has_cache: bool, host_blocks: int
    ) -> None:
        self.now = 0.0
        self.clients: dict[str, Client] = {}
        self.workers: list[Worker] = []
        for _ in range(2):
            worker, _ = toy_worker(
                num_blocks,
                block_size,
                emit=self.take,
                max_num_seqs=3,
                max_batch_tokens=budget,
                piece_bytes=2 * 8 * block_size * piece_blocks,
                enable_prefix_cache=has_cache,
                host_blocks=host_blocks,
                lease_timeout_s=LEASE_S,
            )
            worker.engine.clock = lambda: self.now
            self.workers.append(worker)
        self.channels = [ManualChannel(self.workers[1 - i].inbox) for i in range(2)]
        """Channel i leads from worker i to the other."""

    def take(self, outcomes: list[Outcome]) -> None:
        """What workers emit, as a client's merge sees it."""
        for outcome in outcomes:
            client = self.clients[outcome.request_id]
            if isinstance(outcome, RequestFailed):
                if isinstance(outcome.error, ContextTooLong):
                    num_tokens = client.request.num_prompt_tokens + len(client.so_far)
                    assert self.workers[0].pool.num_blocks_for(num_tokens) >= self.workers[0].pool.num_blocks
                    client.is_over = True
                else:
                    assert isinstance(outcome.error, ReplicaError)
                    client.has_failed = True
                continue
            for index, token in enumerate(outcome.token_ids, outcome.index):
                assert token == client.expected[index], f"{outcome.request_id}: token {index} is wrong"
                client.tokens[index] = token
            if outcome.finish_reason is not None:
                assert outcome.index == len(client.expected) - 1
                assert len(client.so_far) == len(client.expected), "the end came before the rest"
                client.is_over = True

    # ---- what a client and its router do

    @precondition(lambda self: len(self.clients) < 4)
    @rule(
        prompt=st.text("ab", min_size=1, max_size=10),
        max_tokens=st.integers(1, 8),
        images=st.lists(st.integers(1, 2), max_size=2),
        path=st.sampled_from(PATHS),
        is_prefill_first=st.booleans(),
        is_lent=st.booleans(),
    )
    def ask(
        self,
        prompt: str,
        max_tokens: int,
        images: list[int],
        path: tuple[int, int | None],
        is_prefill_first: bool,
        is_lent: bool,
    ) -> None:
        items: list[int | MediaInput] = [ord(letter) for letter in prompt]
        for seed in images:
            items.insert(seed, picture(seed, (1, 2, 2 * seed)))
        request = make_request(items, f"r{len(self.clients)}", max_tokens=max_tokens)
        client = self.clients[request.request_id] = Client(request, answer(request))
        self.attempt(client, path, is_prefill_first, is_lent)

    @precondition(lambda self: any(not c.is_over for c in self.clients.values()))
    @rule(
        data=st.data(),
        path=st.sampled_from(PATHS),
        is_prefill_first=st.booleans(),
        is_aborted_first=st.booleans(),
        is_lent=st.booleans(),
    )
    def ask_again(
        self,
        data: st.DataObject,
        path: tuple[int, int | None],
        is_prefill_first: bool,
        is_aborted_first: bool,
        is_lent: bool,
    ) -> None:
        """Whether or not the attempt before has failed, or has been told that it is not wanted."""
        client = data.draw(st.sampled_from([c for c in self.clients.values() if not c.is_over]))
        if is_aborted_first:
            self.abort_everywhere(client)
        self.attempt(client, path, is_prefill_first, is_lent)

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        client = self.clients[data.draw(st.sampled_from(sorted(self.clients)))]
        client.is_over = True
        self.abort_everywhere(client)

    def attempt(
        self, client: Client, path: tuple[int, int | None], is_prefill_first: bool, is_lent: bool = False
    ) -> None:
        """With the prefix from the other worker, if it has one and that `is_lent`."""
        client.epoch, client.path, client.has_failed = client.epoch + 1, path, False
        prefill, decode = path
        request = dataclasses.replace(client.request, output_token_ids=client.so_far)
        channel = None if decode is None else self.channels[prefill]
        prefix_s = LEASE_S / 4 if is_lent else 0.0
        calls = [lambda: self.workers[prefill].open_prefill(request, client.epoch, channel, prefix_s=prefix_s)]
        if decode is not None:
            calls.insert(is_prefill_first, lambda: self.workers[decode].open_decode(request, client.epoch))
        if is_lent:
            other = 1 - prefill
            calls.append(lambda: self.workers[other].lend(request, client.epoch, 99, self.channels[other]))
        try:
            for call in calls:
                call()
        except (Overloaded, ContextTooLong) as error:
            client.has_failed = True
            client.is_over = isinstance(error, ContextTooLong)
            self.abort_everywhere(client)

    def abort_everywhere(self, client: Client) -> None:
        for worker in self.workers:
            worker.abort(client.request.request_id)

    # ---- what the world does

    @rule(which=st.integers(0, 1), times=st.integers(1, 6))
    def step(self, which: int, times: int) -> None:
        for _ in range(times):
            self.workers[which].engine.step()
            self.workers[which].check()

    @rule(which=st.integers(0, 1), times=st.integers(1, 8))
    def deliver(self, which: int, times: int) -> None:
        for _ in range(min(times, len(self.channels[which].jobs))):
            self.channels[which].deliver()

    @rule(which=st.integers(0, 1), error=st.sampled_from([TransferFailed("lost"), ReplicaLost("gone")]))
    def fail(self, which: int, error: ReplicaError) -> None:
        if self.channels[which].jobs:
            self.channels[which].fail(error)

    @rule(which=st.integers(0, 1))
    def hold(self, which: int) -> None:
        channel = self.channels[which]
        if channel.jobs and channel.jobs[0].header is not None:
            channel.hold()

    @rule(which=st.integers(0, 1))
    def arrive_late(self, which: int) -> None:
        channel, worker = self.channels[which], self.workers[1 - which]
        if not channel.held:
            return
        header, _ = channel.held[0]
        before = worker.engine.runner.kv.data.clone()
        if self.clients[header.request_id].epoch != header.epoch:
            with pytest.raises(TransferFailed):
                channel.arrive_late()
            assert worker.engine.runner.kv.data.equal(before), "a piece of an old attempt was written"
            return
        try:
            channel.arrive_late()
        except TransferFailed:
            assert worker.engine.runner.kv.data.equal(before), "a refused piece was written"

    @precondition(lambda self: self.clients)
    @rule(data=st.data(), age=st.integers(0, 2), rows_each=st.integers(1, 4))
    def show(self, data: st.DataObject, age: int, rows_each: int) -> None:
        """Pictures come from a vision replica, perhaps for an attempt that is over."""
        client = self.clients[data.draw(st.sampled_from(sorted(self.clients)))]
        self.show_to(client, client.epoch - age, rows_each)

    def show_to(self, client: Client, epoch: int, rows_each: int) -> None:
        worker, request_id = self.workers[client.path[0]], client.request.request_id
        sequence = worker.engine.sequences.get(request_id)
        if sequence is not None and sequence.epoch != epoch:
            sequence = None
        for index in range(len(client.request.media)):
            for piece in picture_pieces(client.request, index, epoch, rows_each):
                if sequence is None:
                    with pytest.raises(TransferFailed):
                        worker.inbox.accept(*piece)
                elif index in sequence.awaited_media and index not in sequence.embeds:
                    worker.inbox.accept(*piece)

    @precondition(lambda self: self.clients)
    @rule(data=st.data(), age=st.integers(0, 2), which=st.integers(0, 1))
    def commit_without_pieces_arrives(self, data: st.DataObject, age: int, which: int) -> None:
        client = self.clients[data.draw(st.sampled_from(sorted(self.clients)))]
        commit: Message = {"type": "commit", "request_id": client.request.request_id, "epoch": client.epoch - age}
        with pytest.raises(TransferFailed):
            self.workers[which].inbox.handle({**commit, "num_pieces": 0, "output": [1]}, lambda reply: None)

    @precondition(lambda self: self.clients)
    @rule(data=st.data(), age=st.integers(0, 2), which=st.integers(0, 1))
    def stray_claim_arrives(self, data: st.DataObject, age: int, which: int) -> None:
        """Of a vision replica, or of a prefill replica that was given up."""
        client = self.clients[data.draw(st.sampled_from(sorted(self.clients)))]
        claim: Message = {"type": "claim", "request_id": client.request.request_id, "epoch": client.epoch - age}
        if age or client.path[1] != which:  # else it would take the answer that the prefill waits for
            try:
                self.workers[which].inbox.handle(claim, lambda reply: None)
            except TransferFailed:
                assert age

    @rule(seconds=st.sampled_from([1.0, LEASE_S / 2, LEASE_S]), is_renewed=st.booleans())
    def pass_time(self, seconds: float, is_renewed: bool) -> None:
        self.now += seconds
        for worker in self.workers:
            if is_renewed:
                worker.renew([r for r, c in self.clients.items() if not c.is_over])
            worker.sweep()

    # ---- what must hold

    @invariant()
    def agrees(self) -> None:
        for worker in getattr(self, "workers", ()):
            assert worker.check()

    def teardown(self) -> None:
        """When the world behaves again, every request ends rightly and every block comes home."""
        if not hasattr(self, "workers"):
            return
        self.run_until_quiet()
        self.let_leases_run_out()
        for number, client in enumerate(self.clients.values()):
            for _ in range(3):
                if client.is_over:
                    break
                self.abort_everywhere(client)
                self.run_until_quiet()
                self.attempt(client, PATHS[number % len(PATHS)], number % 2 == 0, number % 3 == 0)
                self.run_until_quiet()
            assert client.is_over
            self.abort_everywhere(client)  # where the first token was the last, a lease waits for nothing
        self.let_leases_run_out()
        self.run_until_quiet()
        for worker in self.workers:
            assert worker.pool.num_used == 0
            assert worker.snapshot().num_waiting == 0

    def let_leases_run_out(self) -> None:
        self.now += LEASE_S
        for worker in self.workers:
            worker.sweep()

    def run_until_quiet(self) -> None:
        bound = 50 + 100 * len(self.clients)
        for _ in range(bound):
            for channel in self.channels:
                channel.deliver_all()
            for client in self.clients.values():
                self.show_to(client, client.epoch, 1)
            did_run = [worker.engine.step() for worker in self.workers]
            if not any(did_run) and not any(channel.jobs for channel in self.channels):
                return
        raise AssertionError(f"not quiet after {bound} rounds")


TestHistories = HistoryMachine.TestCase
TestHistories.settings = settings(
    max_examples=120, stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow], deadline=None
)
