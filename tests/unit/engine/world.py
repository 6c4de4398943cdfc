"""Replicas that hand over, lend and die, and a network between them that the test holds in its hands.

The workers are real: leases, block pool, inbox, hand-over, lending, followers, engine. Only the model is a toy: K and V of a
token are its id and positions times a factor of layer and head, so what every block must hold is known from its request
alone, and the next token is a function of everything that a sequence's block table names. Every transport's checksum is
computed and compared; nothing waits, nothing has a thread, and time is a number.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ernie_cluster.engine.crew import Crew
from ernie_cluster.engine.engine import Outcome
from ernie_cluster.engine.follower import Follower
from ernie_cluster.engine.handover import Peers
from ernie_cluster.engine.host_tier import HostMemory
from ernie_cluster.engine.sampler import Sampled, SamplerRow
from ernie_cluster.engine.slices import KV_PIECE, SliceOf
from ernie_cluster.engine.worker import Worker, WorkerSettings
from ernie_cluster.errors import ReplicaError, ReplicaLost, TransferFailed
from ernie_cluster.model.decoder import no_hook
from ernie_cluster.model.step import KVCache, StepInput
from ernie_cluster.request import GenerationRequest, extend_hashes
from ernie_cluster.transport import inbox, wire
from ernie_cluster.transport.base import Message, Pack, Payload, PieceHeader, Reply, Sink
from ernie_cluster.transport.choose import Endpoint
from tests.tiny import tiny_config
from tests.unit.engine.toy import embed

NUM_LAYERS, NUM_HEADS = 2, 2
LEASE_S = 10.0
_VOCAB = 500
"""Below the special tokens."""
_FACTORS = np.arange(1, 1 + NUM_LAYERS * 2 * NUM_HEADS, dtype=np.int64).reshape(NUM_LAYERS, 2, NUM_HEADS)
"""[layer, K or V, head]."""
_MIX = np.int64(-0x61C8864680B583EB)


def _mix(x: NDArray[np.int64]) -> NDArray[np.int64]:
    x = x * _MIX  # wraps around
    return (x ^ (x >> 29)) * np.int64(0x1B03738712FAD5C9)


def _values(ids: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
    return _mix(ids * 1_000_003 + positions[0] * 10_007 + positions[1:].sum(0))


class Truth:
    """What a request must be answered, and what the blocks of its tokens must hold."""

    def __init__(self, request: GenerationRequest, block_size: int) -> None:
        start, end = request.num_prompt_tokens, request.num_prompt_tokens + request.sampling.max_tokens
        ids = np.zeros(end, np.int64)
        ids[:start] = request.prompt_token_ids
        positions = np.tile(np.arange(end), (3, 1)) + request.position_delta
        positions[:, :start] = request.positions
        tokens = [*request.prompt_token_ids.tolist()]
        for media in request.media:
            ids[media.offset : media.end] = embed(media)[:, 0].numpy()
        values = np.zeros(end, np.int64)
        values[:start] = _values(ids[:start], positions[:, :start])
        for i in range(start, end):
            tokens.append(_next(values[:i].sum(keepdims=True) * _FACTORS.sum()))
            values[i : i + 1] = _values(np.array(tokens[i:]), positions[:, i : i + 1])
        self.answer, self.values = tokens[start:], values
        self.hashes: list[bytes] = []
        """Of all full blocks of the prompt and the whole answer."""
        extend_hashes(self.hashes, tokens, request.media, block_size, request.cache_salt)


def _next(seen_1: NDArray[np.int64]) -> int:
    return int(_mix(seen_1)[0]) % _VOCAB


# ---- a replica


class ToyCrew(Crew):
    """Tells a follower its notes when it is asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.follower: Follower | None = None

    def tell(self) -> Callable[[int], None]:
        if self.follower is None or not self._notes:
            return no_hook
        notes = [self._notes.popleft() for _ in range(len(self._notes))]
        return self.follower.noted(notes)

    def rest(self) -> bool:
        self.tell()
        return False


class Heads:
    """Answers the calls of `Runner`, for one or two ranks, each with heads of its own."""

    def __init__(self, tp: int, num_blocks: int, block_size: int) -> None:
        shape = NUM_LAYERS, 2, num_blocks, block_size, NUM_HEADS // tp, 1
        self.caches = [KVCache(torch.zeros(shape, dtype=torch.int64)) for _ in range(tp)]
        self.kv, self.block_size = self.caches[0], block_size
        self.device, self.dtype = torch.device("cpu"), torch.int64
        self.crew, self.buckets = ToyCrew(), None
        self.pages = [cache.data.numpy()[..., 0] for cache in self.caches]
        """[layers, 2, blocks, block_size, heads] of each rank."""
        self.factors = np.split(_FACTORS, tp, 2)

    def run(self, step: StepInput, rows: Sequence[SamplerRow], layer_done: Callable[[int], None] = no_hook) -> Sampled:
        slots, ids = step.slots_T.numpy(), step.token_ids_T.numpy().astype(np.int64)
        assert len(set(slots.tolist())) == step.num_tokens, "two tokens in one slot"
        assert slots.min() >= self.block_size, "block 0 is written"
        if step.media_embeds is not None:
            ids[step.media_rows.numpy()] = step.media_embeds[:, 0].numpy()
        values = _values(ids, step.positions_3T.numpy().astype(np.int64))
        follower_done = self.crew.tell()
        for layer in range(NUM_LAYERS):
            for pages, factors in zip(self.pages, self.factors, strict=True):
                flat = pages[layer].reshape(2, -1, pages.shape[-1])
                flat[:, slots] = values[None, :, None] * factors[layer][:, None]
            layer_done(layer)
            follower_done(layer)
        last_rows = set(step.logits_rows.tolist())
        ends = np.cumsum(step.query_lens).tolist()
        wanted = [i for i, end in enumerate(ends) if end - 1 in last_rows]
        assert len(wanted) == len(rows)
        tables = step.block_tables_BM.numpy()
        return Sampled([self._next(tables[i], step.context_lens[i]) for i in wanted])

    def rest(self) -> bool:
        return self.crew.rest()

    def _next(self, table: NDArray[np.int32], context: int) -> int:
        table = table[: -(-context // self.block_size)]
        seen = [pages[:, :, table].reshape(NUM_LAYERS, 2, -1, pages.shape[-1])[:, :, :context] for pages in self.pages]
        return _next(np.array([part.sum() for part in seen]).sum(keepdims=True))


def _at_once(call: Callable[[], None]) -> None:
    call()


class Replica:
    """A worker, and the rank that follows it where there are two; gone for ever when it dies."""

    def __init__(self, world: World, name: str, tp: int, settings: WorkerSettings, num_blocks: int) -> None:
        self.world, self.name, self.is_alive = world, name, True
        self.heads = Heads(tp, num_blocks, settings.block_size)
        self.worker = Worker(self.heads, tiny_config(), settings, self._emit)  # type: ignore[arg-type]
        self.worker.engine.clock = lambda: world.now
        self.sinks: list[Sink] = [self.worker.inbox]
        self.follower: Follower | None = None
        if tp > 1:
            part, kv = SliceOf(NUM_HEADS, 1, tp), self.heads.caches[1]
            memory = HostMemory(kv.data, settings.host_blocks) if settings.host_blocks else None
            connect = lambda endpoint: world.line(self, 1, endpoint.actor_name)  # noqa: E731
            self.follower = Follower(kv, part, settings.piece_bytes, connect, memory, _at_once)  # type: ignore[arg-type]
            self.heads.crew.follower = self.follower
            self.sinks.append(self.follower)
            self.worker.lead([world.orders(self)])  # type: ignore[list-item]

    def way_to(self, other: Replica) -> tuple[Line, Peers]:
        """As an actor makes it for a hand-over or a loan."""
        names = [f"{other.name}/{rank}" for rank in range(len(other.sinks))]
        endpoints = tuple(Endpoint("here", None, name) for name in names)
        targets = self.worker.sender.targets(len(names))
        channels = {rank: self.world.line(self, 0, names[rank]) for rank in targets}
        return self.world.line(self, 0, names[0]), Peers(endpoints, channels)  # type: ignore[arg-type]

    def step(self) -> bool:
        did_run = self.worker.engine.step()
        if not did_run:
            self.heads.rest()
        return did_run

    def _emit(self, outcomes: list[Outcome]) -> None:
        if self.is_alive:
            self.is_alive = self.worker.failure is None  # its last words, for it is to be replaced
            try:
                self.world.take(self, outcomes)
            except AssertionError as e:  # in the callback of a future nobody would see it
                self.world.faults.append(e)


# ---- the network


@dataclass(slots=True, eq=False)
class Parcel:
    """A piece or a call on its way."""

    header: PieceHeader | None
    pack: Pack | None
    message: Message
    future: Future[Any]
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Late:
    """A piece that its sender has given up, and that is on its way still."""

    replica: int
    rank: int
    header: PieceHeader
    digest: int
    payload: Payload


class Line:
    """A `transport.base.Channel` of which the test decides what arrives, and when.

    Args:
        world: knows the time, and what pieces must hold.
        sender: name of the replica at this end.
        target: the one at the other end.
        rank: of the target.
    """

    max_piece_bytes = 1 << 20

    def __init__(self, world: World, sender: str, target: Replica, rank: int) -> None:
        self._world, self.sender, self.target, self.rank = world, sender, target, rank
        self.jobs: deque[Parcel] = deque()
        self.unanswered: list[Parcel] = []
        self.is_lost = False

    # ---- `Channel`

    def push(self, header: PieceHeader, pack: Pack) -> Future[None]:
        return self._add(Parcel(header, pack, {}, Future(), self._world.now + LEASE_S))

    def call(self, message: Message, timeout_s: float) -> Future[Message]:
        message = json.loads(json.dumps(message))
        return self._add(Parcel(None, None, message, Future(), self._world.now + timeout_s))

    def close(self) -> None:
        self.cut(0)

    # ---- what becomes of the next job

    def deliver(self, is_spoilt: bool = False) -> None:
        """It arrives; a piece of which a bit has flipped is told by its checksum."""
        job = self.jobs.popleft()
        if job.header is None:
            self.unanswered.append(job)
            try:
                self.target.sinks[self.rank].handle(job.message, lambda reply: self._answer(job, reply))
            except TransferFailed as e:
                self._answer(job, e)
            return
        packed = self._packed(job)
        if isinstance(packed, Exception):
            job.future.set_exception(packed)
            return
        digest, payload = packed
        if is_spoilt:
            payload[len(payload) // 2] ^= 1
        payload.flags.writeable = False
        refusal = self._world.accept(self.target, self.rank, job.header, digest, payload)
        if refusal is None:
            job.future.set_result(None)
        else:
            job.future.set_exception(TransferFailed(refusal))

    def lose(self, error: ReplicaError) -> None:
        """It does not arrive, and the sender is told so."""
        self.jobs.popleft().future.set_exception(error)

    def keep(self) -> None:
        """The next piece arrives once more, later."""
        self._keep(self.jobs[0])

    def hold(self) -> None:
        """The next piece seems lost to the sender, but is on its way still."""
        self.keep()
        self.lose(TransferFailed("held up"))

    def hurry(self) -> None:
        """The next call arrives before the pieces that it was to stay behind, by a way that does not keep the order."""
        call = next((job for job in self.jobs if job.header is None), self.jobs[0])
        self.jobs.remove(call)
        self.jobs.appendleft(call)

    def cut(self, num_late: int) -> None:
        """The channel is lost, and the sender told so; its next pieces may arrive yet."""
        self.is_lost = True
        for job in list(self.jobs)[:num_late]:
            self._keep(job)
        jobs, unanswered = self.jobs, self.unanswered
        self.jobs, self.unanswered = deque(), []
        for job in (*unanswered, *jobs):
            job.future.set_exception(ReplicaLost(f"{self.target.name} is gone"))

    def expire(self) -> None:
        """Calls without an answer fail in their time, unsent ones are never sent; a piece that stands still is the end."""
        now = self._world.now
        if any(job.header is not None and job.deadline_s <= now for job in self.jobs):
            self.cut(0)
            return
        late = [job for job in (*self.jobs, *self.unanswered) if job.deadline_s <= now]
        self.jobs = deque(job for job in self.jobs if job not in late)
        self.unanswered = [job for job in self.unanswered if job not in late]
        for job in late:
            job.future.set_exception(TransferFailed("no reply within the timeout of the call"))

    # ---- inside

    def _add(self, job: Parcel) -> Future[Any]:
        if self.is_lost:
            job.future.set_exception(ReplicaLost(f"{self.target.name} is gone"))
        else:
            self.jobs.append(job)
        return job.future

    def _answer(self, job: Parcel, answer: Message | Exception) -> None:
        if job not in self.unanswered:
            return  # too late, or a second one
        self.unanswered.remove(job)
        if isinstance(answer, Exception):
            job.future.set_exception(answer)
        else:
            job.future.set_result(json.loads(json.dumps(answer)))

    def _keep(self, job: Parcel) -> None:
        if job.header is None:
            return
        packed = self._packed(job)
        if not isinstance(packed, Exception):
            number = self._world.replicas.index(self.target) if self.target in self._world.replicas else 0
            self._world.late.append(Late(number, self.rank, job.header, *packed))

    def _packed(self, job: Parcel) -> tuple[int, Payload] | Exception:
        assert job.header is not None
        assert job.pack is not None
        payload = np.zeros(job.header.nbytes, np.uint8)
        try:
            job.pack(payload)
        except TransferFailed as e:
            return e
        self._world.audit(job.header, payload, self.target, self.rank)
        return wire.checksum(payload), payload


class Strict:
    """A rank's sink. `transport.inbox` takes a bug of the sink for a refusal; here it is the end of the test."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self.has_taken = False
        self.bug: Exception | None = None

    def accept(self, header: PieceHeader, payload: Payload) -> None:
        try:
            self._sink.accept(header, payload)
            self.has_taken = True
        except TransferFailed:
            raise
        except Exception as e:
            self.bug = e
            raise

    def handle(self, message: Message, reply: Reply) -> None:
        raise NotImplementedError

    def disconnected(self, peer: str) -> None:
        raise NotImplementedError


@dataclass(eq=False)
class World:
    """Two replicas, whose numbers stay when they are replaced, and the lines between all ranks.

    Args:
        tps: ranks of each.
        num_blocks: of each rank's cache.
        settings: of each worker.
        take: what replicas emit that are alive.
    """

    tps: tuple[int, int]
    num_blocks: int
    settings: WorkerSettings
    take: Callable[[Replica, list[Outcome]], None]
    now: float = 0.0
    replicas: list[Replica] = field(default_factory=list)
    lines: dict[tuple[str, str], Line] = field(default_factory=dict)
    """By the names of both ends."""
    late: deque[Late] = field(default_factory=deque)
    truths: dict[str, Truth] = field(default_factory=dict)
    """By the name that a replica knows a request by."""
    lengths: dict[tuple[str, int], int] = field(default_factory=dict)
    """Tokens of each attempt, as it was asked for."""
    contents: dict[bytes, NDArray[np.int64]] = field(default_factory=dict)
    """What a block of this hash must hold, for each token."""
    faults: list[AssertionError] = field(default_factory=list)
    """What was wrong in what replicas emitted."""
    num_made: int = 0

    def __post_init__(self) -> None:
        for number in range(len(self.tps)):
            self.replicas.append(self._new(number))

    # ---- ends of lines

    def line(self, sender: Replica, rank: int, name: str) -> Line:
        """The way from one rank to another, made anew where it was lost; raises ReplicaLost when nobody is there."""
        ways = self.lines
        key = f"{sender.name}/{rank}", name
        if key not in ways or ways[key].is_lost:
            replica_name, _, number = name.partition("/")
            target = next((r for r in self.replicas if r.name == replica_name), None)
            if target is None:
                raise ReplicaLost(f"{name} is not there")
            ways[key] = Line(self, sender.name, target, int(number))
        return ways[key]

    def orders(self, leader: Replica) -> Line:
        """A leader's line to its follower."""
        line = self.lines[f"{leader.name}/orders", f"{leader.name}/1"] = Line(self, leader.name, leader, 1)
        return line

    def busy(self) -> list[Line]:
        """Lines on which something waits, in a fixed order."""
        return [line for line in self.lines.values() if line.jobs]

    def orders_of(self) -> list[Line]:
        """The lines within gangs."""
        return [line for line in self.lines.values() if line.target.name == line.sender]

    # ---- what happens to replicas

    def die(self, number: int, num_late: int) -> None:
        """A replica is gone, and another one in its place; of what it sent the first pieces on each line may arrive yet."""
        dead = self.replicas[number]
        dead.is_alive = False
        own = [key for key in self.lines if key[0].partition("/")[0] == dead.name]
        for key in own:
            line = self.lines.pop(key)
            for job in list(line.jobs)[:num_late]:
                line._keep(job)
            line.jobs.clear()
            line.unanswered.clear()
        lost = [line for line in self.lines.values() if line.target is dead]
        self.replicas[number] = self._new(number)
        for line in lost:
            line.cut(0)

    def accept(self, target: Replica, rank: int, header: PieceHeader, digest: int, payload: Payload) -> str | None:
        """A piece arrives at a rank; why it is refused, or None. None that is taken is of an attempt that is over."""
        sink = Strict(target.sinks[rank])
        refusal = inbox.accept(sink, header, digest, payload)
        if sink.bug is not None:
            raise sink.bug
        if sink.has_taken and header.detail[0] == KV_PIECE:
            lease = target.worker.leases._leases.get(header.request_id)
            ending = [(x.request_id, x.epoch) for x in target.worker.leases._ending]
            is_now = lease is not None and lease.epoch == header.epoch
            assert is_now or (header.request_id, header.epoch) in ending, f"{header} came too late, and was taken"
        return refusal

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for line in list(self.lines.values()):
            line.expire()
        for number, replica in enumerate(self.replicas):
            if replica.worker.failure is not None:  # its ranks did not hear each other for too long
                self.die(number, 0)
            self.replicas[number].worker.sweep()

    def _new(self, number: int) -> Replica:
        self.num_made += 1
        return Replica(self, f"{number}.{self.num_made}", self.tps[number], self.settings, self.num_blocks)

    # ---- what must hold

    def know(self, name: str, truth: Truth) -> None:
        """A request will be asked under this name."""
        self.truths[name] = truth
        size = self.settings.block_size
        for i, digest in enumerate(truth.hashes):
            self.contents[digest] = truth.values[i * size : (i + 1) * size]

    def audit(self, header: PieceHeader, payload: Payload, target: Replica, rank: int) -> None:
        """What leaves a replica is the request's own, whatever has become of the request."""
        _, first_layer, num_layers, first, count, head, num_heads = header.detail
        assert header.detail[0] == KV_PIECE
        size = self.settings.block_size
        end = min((first + count) * size, self.lengths[header.request_id, header.epoch])
        num_tokens = end - first * size
        found = payload.view(np.int64).reshape(num_layers, 2, -1, num_heads)[:, :, :num_tokens]
        head += rank * NUM_HEADS // len(target.sinks)
        factors = _FACTORS[first_layer : first_layer + num_layers, :, None, head : head + num_heads]
        expected = self.truths[header.request_id].values[first * size : end, None] * factors
        if not np.array_equal(found, expected):
            self.faults.append(AssertionError(f"{header} bears what is not its request's"))

    def check(self) -> None:
        """No block has two owners, and whoever may read a block finds in it what belongs there."""
        if self.faults:
            raise self.faults[0]
        for replica in self.replicas:
            worker = replica.worker
            assert worker.check()
            self._check_writers(replica)
            if not replica.heads.crew.has_notes or replica.follower is None:
                for where, block, values in self._readable(replica):
                    for pages, factors in zip(replica.heads.pages, replica.heads.factors, strict=True):
                        found = pages[:, :, block, : len(values)]
                        ok = np.array_equal(found, values[:, None] * factors[:, :, None])
                        assert ok, f"replica {replica.name}: block {block} does not hold what {where} reads there"

    def _readable(self, replica: Replica) -> Iterator[tuple[str, int, NDArray[np.int64]]]:
        """(who reads, block, value of each token) of all that may be read in a replica."""
        size, worker = self.settings.block_size, replica.worker
        for digest, block in worker.pool._block_of.items():
            yield "the prefix cache", block, self.contents[digest]
        for sequence in worker.engine.sequences.values():
            values = self.truths[sequence.request_id].values
            for i in range(-(-sequence.num_computed // size)):
                part = values[i * size : min((i + 1) * size, sequence.num_computed)]
                yield sequence.request_id, sequence.blocks[i], part

    def _check_writers(self, replica: Replica) -> None:
        """A block that somebody may write to has no other holder."""
        worker, size = replica.worker, self.settings.block_size
        references = worker.pool._references
        leases = [*worker.leases._leases.values(), *worker.leases._ending]
        writable = [block for lease in leases for block in lease.blocks[lease.num_shared :]]
        for sequence in worker.engine._all():
            writable += sequence.blocks[sequence.num_computed // size :]
        for block in writable:
            assert references[block] == 1, (
                f"replica {replica.name}: block {block} is written to, and not its writer's alone"
            )
        if replica.follower is not None:
            for (request_id, epoch), mirror in replica.follower._leases.items():
                own = [x.blocks for x in leases if (x.request_id, x.epoch) == (request_id, epoch)]
                assert own == [mirror.blocks], f"{request_id}, attempt {epoch}: its blocks are another's by now"

    def check_empty(self) -> None:
        """Nothing is left of anybody."""
        for replica in self.replicas:
            worker = replica.worker
            what = {
                "blocks": worker.pool.num_used,
                "leases": len(worker.leases) + len(worker.leases._ending),
                "prompts on their way in": len(worker._openings),
                "requests whose KV is expected": worker.inbox.num_expected,
                "claims": len(worker.inbox._claims._waiting),
                "fetches": len(worker.inbox.fetches._open),
                "prompts begun": len(worker.inbox._begun),
                "loans": len(worker.lender.blocks()),
                "sequences": len(worker.engine._all()),
                "hand-overs": len(worker.sender._active),
                "a follower's books": replica.follower is not None and not replica.follower.is_idle,
            }
            left = {name: count for name, count in what.items() if count}
            assert not left, f"replica {replica.name} has left {left}"
