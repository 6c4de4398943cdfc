"""A state machine over everything that replicas lend each other, for whoever checks it as it is or with a fence taken out."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ernie_cluster.engine.engine import Outcome
from ernie_cluster.engine.slices import KV_PIECE
from ernie_cluster.engine.worker import WorkerSettings
from ernie_cluster.errors import ContextTooLong, DeadlineExceeded, Overloaded, ReplicaError, TransferFailed
from ernie_cluster.request import GenerationRequest, MediaInput, RequestFailed
from ernie_cluster.transport import wire
from ernie_cluster.transport.base import Payload, PieceHeader
from tests.tiny import make_request
from tests.unit.engine.toy import picture, picture_pieces
from tests.unit.engine.world import LEASE_S, NUM_HEADS, NUM_LAYERS, Late, Line, Replica, Truth, World

TIMEOUT_S = 3 * LEASE_S
"""Of each request."""
PATHS = [(0, 1), (0, 1), (1, 0), (0, None), (1, None)]
"""(prefill, decode or None where one replica does both)."""
LENT = ["", "", "its own", "another's"]
"""Whose prefix the other replica is asked to lend; none at all."""
MAX_CLIENTS = 4


@dataclass(slots=True, eq=False)
class Client:
    """Who asked, and what has come."""

    request: GenerationRequest
    truth: Truth
    epoch: int = -1
    path: tuple[int, int | None] = (0, None)
    tokens: dict[int, int] = field(default_factory=dict)
    ends: list[str] = field(default_factory=list)
    """How it has ended; one, when all is over."""

    @property
    def is_over(self) -> bool:
        return bool(self.ends)

    @property
    def so_far(self) -> tuple[int, ...]:
        out: list[int] = []
        while len(out) in self.tokens:
            out.append(self.tokens[len(out)])
        return tuple(out)


class Protocol(RuleBasedStateMachine):
    """Requests are asked, asked again under new attempts, and left; messages are late, lost, spoilt, or come twice;
    leases run out; replicas die and are replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.clients: list[Client] = []
        self.owners: dict[str, Client] = {}
        """By the name that replicas know them by."""
        self.ended: Counter[tuple[Replica, str]] = Counter()

    @initialize(
        tps=st.sampled_from([(1, 1), (1, 1), (1, 2), (2, 1), (2, 2)]),
        num_blocks=st.integers(6, 12),
        block_size=st.integers(1, 3),
        budget=st.integers(3, 12),
        piece_blocks=st.integers(1, 4),
        has_cache=st.sampled_from([True, True, False]),
        host_blocks=st.sampled_from([0, 0, 6]),
        are_attempts_named=st.booleans(),
        is_poisoned=st.booleans(),
    )
    def start(
        self,
        tps: tuple[int, int],
        num_blocks: int,
        block_size: int,
        budget: int,
        piece_blocks: int,
        has_cache: bool,
        host_blocks: int,
        are_attempts_named: bool,
        is_poisoned: bool = True,
    ) -> None:
        self.are_attempts_named = are_attempts_named
        """Each attempt has a name of its own, as in the cluster; else epochs alone tell them apart."""
        settings = WorkerSettings(
            block_size=block_size,
            max_batch_tokens=budget,
            max_num_seqs=3,
            enable_prefix_cache=has_cache,
            reserve_output_tokens=2,
            lease_timeout_s=LEASE_S,
            piece_bytes=2 * 8 * block_size * piece_blocks,
            can_encode=True,
            host_blocks=host_blocks if has_cache else 0,
            poison_freed_blocks=is_poisoned,
        )
        self.world = World(tps, num_blocks, settings, self.take)

    # ---- what clients see

    def take(self, replica: Replica, outcomes: list[Outcome]) -> None:
        """Outcomes of a replica, as a client's merge sees them."""
        for outcome in outcomes:
            client, name = self.owners[outcome.request_id], outcome.request_id
            is_end = isinstance(outcome, RequestFailed) or outcome.finish_reason is not None
            if is_end and self.are_attempts_named:
                self.ended[replica, name] += 1
                assert self.ended[replica, name] == 1, f"{name} ended twice on {replica.name}"
            if isinstance(outcome, RequestFailed):
                assert isinstance(outcome.error, (ReplicaError, ContextTooLong, DeadlineExceeded)), outcome.error
                if isinstance(outcome.error, ContextTooLong):
                    self.end(client, "refused")
                continue
            for index, token in enumerate(outcome.token_ids, outcome.index):
                assert token == client.truth.answer[index], f"{name}: token {index} is wrong"
                if name == self.name(client):
                    client.tokens[index] = token
            if outcome.finish_reason is not None:
                assert outcome.index == len(client.truth.answer) - 1
                if name == self.name(client):
                    self.end(client, "answered")

    def end(self, client: Client, how: str) -> None:
        """Once; what late attempts make of it is not read any more."""
        if not client.is_over:
            client.ends.append(how)

    def name(self, client: Client) -> str:
        """What replicas call the present attempt."""
        return f"{client.request.request_id}#{client.epoch}" if self.are_attempts_named else client.request.request_id

    # ---- what clients and routers do

    @precondition(lambda self: len(self.clients) < MAX_CLIENTS)
    @rule(
        prompt=st.text("ab", min_size=1, max_size=8),
        max_tokens=st.integers(1, 5),
        images=st.sampled_from([[], [], [1], [1, 2]]),
        path=st.sampled_from(PATHS),
        is_prefill_first=st.booleans(),
        lent=st.sampled_from(LENT),
        turns=st.integers(0, 12),
    )
    def ask(
        self,
        prompt: str,
        max_tokens: int,
        images: list[int],
        path: tuple[int, int | None],
        is_prefill_first: bool,
        lent: str,
        turns: int,
    ) -> None:
        items: list[int | MediaInput] = [ord(letter) for letter in prompt]
        for seed in images:
            items.insert(seed, picture(seed, (1, 2, 2 * seed)))
        request = make_request(items, f"r{len(self.clients)}", max_tokens=max_tokens)
        request = dataclasses.replace(request, timeout_s=TIMEOUT_S)
        client = Client(request, Truth(request, self.world.settings.block_size))
        self.clients.append(client)
        self.attempt(client, path, is_prefill_first, lent)
        self.move(turns)

    @precondition(lambda self: any(not c.is_over for c in self.clients))
    @rule(
        which=st.integers(0, MAX_CLIENTS - 1),
        path=st.sampled_from(PATHS),
        is_prefill_first=st.booleans(),
        is_aborted_first=st.booleans(),
        lent=st.sampled_from(LENT),
        turns=st.integers(0, 12),
    )
    def ask_again(
        self,
        which: int,
        path: tuple[int, int | None],
        is_prefill_first: bool,
        is_aborted_first: bool,
        lent: str,
        turns: int,
    ) -> None:
        """Whether or not the attempt before has failed, or has been told that it is not wanted."""
        unanswered = [c for c in self.clients if not c.is_over]
        client = unanswered[which % len(unanswered)]
        if is_aborted_first:
            self.abort(client)
        self.attempt(client, path, is_prefill_first, lent)
        self.move(turns)

    @precondition(lambda self: self.clients)
    @rule(which=st.integers(0, MAX_CLIENTS - 1), is_told=st.booleans())
    def leave(self, which: int, is_told: bool) -> None:
        """Or the client's API replica dies, and tells nobody."""
        client = self.clients[which % len(self.clients)]
        self.end(client, "left")
        if is_told:
            self.abort(client)

    def attempt(self, client: Client, path: tuple[int, int | None], is_prefill_first: bool, lent: str) -> None:
        """With the prefix from the other replica, if it has one and that is `lent`."""
        client.epoch, client.path = client.epoch + 1, path
        name = self.name(client)
        self.owners[name] = client
        request = dataclasses.replace(client.request, request_id=name, output_token_ids=client.so_far)
        self.world.know(name, client.truth)
        self.world.lengths[name, client.epoch] = request.num_prompt_tokens + len(client.so_far)
        prefill, decode = self.world.replicas[path[0]], None if path[1] is None else self.world.replicas[path[1]]
        way = (None,) if decode is None else prefill.way_to(decode)
        prefix_s = LEASE_S / 4 if lent else 0.0
        calls = [lambda: prefill.worker.open_prefill(request, client.epoch, *way, prefix_s=prefix_s)]
        if decode is not None:
            calls.insert(is_prefill_first, lambda: decode.worker.open_decode(request, client.epoch))
        if lent:
            source, wanted = self.world.replicas[1 - path[0]], request
            if lent == "another's":  # whoever saw it there was mistaken
                wanted = dataclasses.replace(self.clients[0].request, request_id=name)
            calls.append(lambda: source.worker.lend(wanted, client.epoch, 99, *source.way_to(prefill)))
        try:
            for call in calls:
                call()
        except (Overloaded, ContextTooLong) as error:
            if isinstance(error, ContextTooLong):
                self.end(client, "refused")
            self.abort(client)

    def abort(self, client: Client) -> None:
        """The present attempt, everywhere."""
        for replica in self.world.replicas:
            replica.worker.abort(self.name(client))

    # ---- what the network and the machines do

    @precondition(lambda self: self.clients)
    @rule(which=st.integers(0, 1), times=st.integers(1, 4))
    def step(self, which: int, times: int) -> None:
        for _ in range(times):
            self.world.replicas[which].step()

    @precondition(lambda self: self.clients)
    @rule(turns=st.integers(1, 12))
    def go_on(self, turns: int) -> None:
        self.move(turns)

    def move(self, turns: int) -> None:
        """Whatever can move moves, one thing at a time."""
        for _ in range(turns):
            busy = self.world.busy()
            if busy:
                busy[0].deliver()
                continue
            for client in self.clients:
                self.show_to(client, self.name(client), client.epoch, 2)
            for replica in self.world.replicas:
                replica.step()

    @precondition(lambda self: self.wayside())
    @rule(which=st.integers(0, 7), how=st.sampled_from(["hold", "lose", "spoil", "cut", "twice", "overtake"]))
    def mishap(self, which: int, how: str) -> None:
        """Befalls the next job on a line between replicas; a gang's own lines stand and fall with it."""
        lines = self.wayside()
        line = lines[which % len(lines)]
        is_piece = line.jobs[0].header is not None
        if how == "cut":
            line.cut(2)
        elif how == "hold" and is_piece:
            line.hold()
        elif how == "spoil" and is_piece:
            line.deliver(is_spoilt=True)
        elif how == "twice" and is_piece:
            line.keep()
            line.deliver()
        elif how == "overtake":
            line.hurry()
            line.deliver()
        else:
            line.lose(TransferFailed("lost"))

    def wayside(self) -> list[Line]:
        """Lines between replicas on which something waits."""
        return [line for line in self.world.busy() if line.target.name != line.sender]

    @precondition(lambda self: self.world.late)
    @rule(which=st.integers(0, 7))
    def arrive_late(self, which: int) -> None:
        """Perhaps at a replica that was not there when the piece was sent."""
        late: Late = self.world.late[which % len(self.world.late)]
        self.world.late.remove(late)
        target = self.world.replicas[late.replica]
        if late.rank < len(target.sinks):
            self.world.accept(target, late.rank, late.header, late.digest, late.payload)

    @rule(which=st.integers(0, 1), num_late=st.integers(0, 3))
    def die(self, which: int, num_late: int) -> None:
        self.world.die(which, num_late)

    @rule(seconds=st.sampled_from([1.0, LEASE_S / 2, LEASE_S]), is_renewed=st.booleans())
    def pass_time(self, seconds: float, is_renewed: bool) -> None:
        if is_renewed:
            for replica in self.world.replicas:
                replica.worker.renew([self.name(c) for c in self.clients if not c.is_over])
        self.world.pass_time(seconds)

    @precondition(lambda self: self.clients)
    @rule(which=st.integers(0, MAX_CLIENTS - 1), age=st.integers(0, 2), rows_each=st.integers(1, 4))
    def show(self, which: int, age: int, rows_each: int) -> None:
        """Pictures come from a vision replica, perhaps for an attempt that is over."""
        client = self.clients[which % len(self.clients)]
        self.show_to(client, self.name(client), client.epoch - age, rows_each)

    def show_to(self, client: Client, name: str, epoch: int, rows_each: int) -> None:
        replica = self.world.replicas[client.path[0]]
        request = dataclasses.replace(client.request, request_id=name)
        for index in range(len(request.media)):
            for header, payload in picture_pieces(request, index, epoch, rows_each):
                self.world.accept(replica, 0, header, wire.checksum(payload), payload)

    @precondition(lambda self: not self.are_attempts_named and any(c.epoch > 0 for c in self.clients))
    @rule(which=st.integers(0, MAX_CLIENTS - 1), where=st.integers(0, 1))
    def open_comes_late(self, which: int, where: int) -> None:
        """An order of the attempt before arrives after those of the present one."""
        again = [c for c in self.clients if c.epoch > 0]
        client, worker = again[which % len(again)], self.world.replicas[where].worker
        was_at = self.is_at(client, where)
        try:
            worker.open_decode(client.request, client.epoch - 1)
        except (TransferFailed, Overloaded, ContextTooLong):
            return
        assert self.is_at(client, where) or not was_at, "an old attempt took the place of a newer one"

    def is_at(self, client: Client, where: int) -> bool:
        """Whether a replica holds something of the present attempt."""
        worker, name = self.world.replicas[where].worker, self.name(client)
        lease, sequence = worker.leases._leases.get(name), worker.engine.sequences.get(name)
        return client.epoch in [x.epoch for x in (lease, sequence) if x is not None]

    @precondition(lambda self: self.clients)
    @rule(which=st.integers(0, MAX_CLIENTS - 1), where=st.integers(0, 1), block=st.integers(0, 3))
    def piece_goes_astray(self, which: int, where: int, block: int) -> None:
        """It names a block that is not its attempt's to write to: one of the shared prefix, or one behind the lease."""
        client, replica = self.clients[which % len(self.clients)], self.world.replicas[where]
        lease = replica.worker.leases._leases.get(self.name(client))
        first = block if lease is None or block < lease.num_shared else len(lease.blocks)
        heads = NUM_HEADS // len(replica.sinks)
        nbytes = NUM_LAYERS * 2 * self.world.settings.block_size * heads * 8
        header = PieceHeader(
            self.name(client), client.epoch, 1000 + block, nbytes, (KV_PIECE, 0, NUM_LAYERS, first, 1, 0, heads)
        )
        self.world.accept(replica, 0, header, wire.checksum(payload := _noise(nbytes)), payload)

    # ---- what must hold

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        """However it was left, everything that was lent comes back by itself; then every request ends rightly, once."""
        if not hasattr(self, "world"):
            return
        self.fall_silent()
        for number, client in enumerate(self.clients):
            for _ in range(3):
                if client.is_over:
                    break
                self.attempt(client, PATHS[number % len(PATHS)], number % 2 == 0, LENT[number % 3])
                self.run_until_quiet()
                self.abort(client)  # where the first token was the last, a lease waits for nothing
                self.run_until_quiet()
            assert len(client.ends) == 1, f"{self.name(client)} has ended {len(client.ends)} times"
        self.fall_silent()

    def fall_silent(self) -> None:
        """Nobody says anything any more, not even that they leave; replicas that nobody asks come to rest.

        Some requests are kept alive by an API replica that should have ended them, and has forgotten to.
        """
        orders = self.world.orders_of()
        for line in list(self.world.lines.values()):
            if line not in orders:
                line.cut(0)
        for _ in range(10):
            self.let_gangs_talk()
            for replica in self.world.replicas:
                replica.worker.renew([name for name in self.owners if self.clients.index(self.owners[name]) % 2 == 0])
            self.world.pass_time(LEASE_S / 2)
            self.holds()
        self.let_gangs_talk()
        self.world.check_empty()

    def let_gangs_talk(self) -> None:
        """The lines within gangs live as long as the gangs."""
        for _ in range(8):
            for line in self.world.orders_of():
                while line.jobs:
                    line.deliver()
            for replica in self.world.replicas:
                replica.step()

    def run_until_quiet(self) -> None:
        bound, num_quiet = 50 + 100 * len(self.clients), 0
        for _ in range(bound):
            for line in self.world.busy():
                while line.jobs and not line.is_lost:
                    line.deliver()
            for client in self.clients:
                self.show_to(client, self.name(client), client.epoch, 2)
            did_run = [replica.step() for replica in self.world.replicas]
            num_quiet = 0 if any(did_run) or self.world.busy() else num_quiet + 1
            if num_quiet == 2:  # what a gang's follower did in the first may have been waited for
                return
        raise AssertionError(f"not quiet after {bound} rounds")


def _noise(nbytes: int) -> Payload:
    payload = np.full(nbytes, 7, np.uint8)
    payload.flags.writeable = False
    return payload
