"""A model of three lines behind a real `Worker`, so that thousands of histories run in seconds.

K and V of a token are one number made of its id and positions, in every layer; the next token is a function of the sum
over everything that the sequence's block table names. One block that is wrong, stale or another's changes the answer.
"""

from __future__ import annotations

import functools
import json
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ernie_cluster.engine.crew import Crew
from ernie_cluster.engine.engine import Outcome
from ernie_cluster.engine.sampler import Sampled, SamplerRow
from ernie_cluster.engine.slices import EMBED_PIECE
from ernie_cluster.engine.worker import Worker, WorkerSettings
from ernie_cluster.errors import ErnieClusterError, ReplicaLost, TransferFailed
from ernie_cluster.model.decoder import no_hook
from ernie_cluster.model.step import KVCache, StepInput
from ernie_cluster.request import GenerationRequest, MediaInput
from ernie_cluster.transport.base import Message, Pack, PieceHeader, Reply, Sink
from tests.tiny import Outcomes, make_image, tiny_config

NUM_LAYERS = 2
_VOCAB = 500
"""Below the special tokens."""


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = x * -0x61C8864680B583EB  # int64 wraps around
    return (x ^ (x >> 29)) * 0x1B03738712FAD5C9


class ToyRunner:
    """Answers the calls of `Runner`."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.kv = KVCache(torch.zeros(NUM_LAYERS, 2, num_blocks, block_size, 1, 1, dtype=torch.int64))
        self.device, self.dtype = torch.device("cpu"), torch.int64
        self.crew, self.buckets = Crew(), None

    def run(self, step: StepInput, rows: Sequence[SamplerRow], layer_done: Callable[[int], None] = no_hook) -> Sampled:
        assert len(set(step.slots_T.tolist())) == step.num_tokens, "two tokens in one slot"
        assert step.slots_T.min() >= self.kv.block_size, "block 0 is written"
        ids = step.token_ids_T.clone()
        if step.media_embeds is not None:
            ids[step.media_rows] = step.media_embeds[:, 0]
        value = _mix(ids * 1_000_003 + step.positions_3T[0] * 10_007 + step.positions_3T[1:].sum(0))
        for layer in range(NUM_LAYERS):
            for which in range(2):
                self.kv.data[layer, which].view(-1)[step.slots_T] = value * (1 + 2 * layer + which)
            layer_done(layer)
        last_rows = set(step.logits_rows.tolist())
        ends = np.cumsum(step.query_lens).tolist()
        wanted = [i for i, end in enumerate(ends) if end - 1 in last_rows]
        assert len(wanted) == len(rows)
        return Sampled([self._next(step.block_tables_BM[i].long(), step.context_lens[i]) for i in wanted])

    def rest(self) -> bool:
        return self.crew.rest()

    def _next(self, table: torch.Tensor, context: int) -> int:
        seen = self.kv.data[:, :, table].flatten(2)[:, :, :context]
        return int(_mix(seen.sum()[None])[0]) % _VOCAB


def answer(request: GenerationRequest) -> list[int]:
    """What any engine must generate, by the definition."""
    n = request.num_prompt_tokens + request.sampling.max_tokens
    ids = torch.tensor([*request.prompt_token_ids.tolist(), *[0] * request.sampling.max_tokens])
    positions = torch.arange(n).repeat(3, 1) + request.position_delta
    positions[:, : request.num_prompt_tokens] = torch.from_numpy(request.positions)
    for media in request.media:
        ids[media.offset : media.end] = embed(media)[:, 0]
    out: list[int] = []
    factor = sum(range(1, 2 * NUM_LAYERS + 1))
    while len(out) < request.sampling.max_tokens:
        end = request.num_prompt_tokens + len(out)
        value = _mix(ids[:end] * 1_000_003 + positions[0, :end] * 10_007 + positions[1:, :end].sum(0))
        out.append(int(_mix((value.sum() * factor)[None])[0]) % _VOCAB)
        ids[end] = out[-1]
    return out


picture = functools.cache(make_image)
"""Pictures take a while to draw."""


def embed(media: MediaInput) -> torch.Tensor:
    """What stands for a picture, int64 [tokens, hidden]."""
    base = int.from_bytes(media.media_hash[:4], "little")
    rows = torch.arange(base, base + media.num_tokens)
    return rows[:, None].repeat(1, tiny_config().text.hidden_size)


def picture_pieces(
    request: GenerationRequest, index: int, epoch: int, rows_each: int
) -> list[tuple[PieceHeader, NDArray[np.uint8]]]:
    """A picture's embeddings as a vision replica sends them."""
    rows = embed(request.media[index]).view(torch.uint8).numpy()
    pieces = []
    for number, first in enumerate(range(0, len(rows), rows_each)):
        part = rows[first : first + rows_each]
        detail = (EMBED_PIECE, index, first, len(part))
        pieces.append((PieceHeader(request.request_id, epoch, number, part.size, detail), part.reshape(-1)))
    return pieces


def toy_worker(
    num_blocks: int, block_size: int, *, emit: Callable[[list[Outcome]], None] | None = None, **settings: object
) -> tuple[Worker, Outcomes]:
    """A worker around the toy, not started, whose clock stands still at 0 until it is replaced."""
    outcomes = Outcomes()
    values: dict[str, object] = {
        "block_size": block_size,
        "max_batch_tokens": 16,
        "max_num_seqs": 4,
        "enable_prefix_cache": True,
        "reserve_output_tokens": 2,
        "lease_timeout_s": 10.0,
        "piece_bytes": 4 * block_size * 8,
        "can_encode": True,
        **settings,
    }
    runner = ToyRunner(num_blocks, block_size)
    worker = Worker(runner, tiny_config(), WorkerSettings(**values), emit or outcomes)  # type: ignore[arg-type]
    worker.engine.clock = lambda: 0.0
    return worker, outcomes


@dataclass(slots=True, eq=False)
class _Job:
    header: PieceHeader | None
    pack: Pack | None
    message: Message
    future: Future[Any]


class ManualChannel:
    """A `transport.base.Channel` without a thread: jobs wait until the test delivers, fails or holds them up."""

    max_piece_bytes = 1 << 20

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self.jobs: deque[_Job] = deque()
        self.held: deque[tuple[PieceHeader, NDArray[np.uint8]]] = deque()
        """Pieces that were packed and given up by the sender, and that may arrive yet."""

    def push(self, header: PieceHeader, pack: Pack) -> Future[None]:
        future: Future[None] = Future()
        self.jobs.append(_Job(header, pack, {}, future))
        return future

    def call(self, message: Message, timeout_s: float) -> Future[Message]:
        future: Future[Message] = Future()
        self.jobs.append(_Job(None, None, json.loads(json.dumps(message)), future))
        return future

    def close(self) -> None:
        while self.jobs:
            self.fail(ReplicaLost("the channel was closed"))

    def deliver(self) -> None:
        """The next job arrives."""
        job = self.jobs.popleft()
        try:
            if job.header is None:
                self._sink.handle(job.message, lambda reply: _resolve(job.future, reply))
            else:
                self._sink.accept(job.header, self._packed(job))
                _resolve(job.future, None)
        except TransferFailed as e:
            job.future.set_exception(e)

    def deliver_all(self) -> None:
        while self.jobs:
            self.deliver()

    def fail(self, error: ErnieClusterError) -> None:
        """The next job does not arrive, and the sender is told so."""
        self.jobs.popleft().future.set_exception(error)

    def hold(self) -> None:
        """The next piece seems lost to the sender, but is on its way still."""
        job = self.jobs[0]
        assert job.header is not None
        try:
            self.held.append((job.header, self._packed(job)))
        except TransferFailed as e:  # its blocks are others' by now
            self.fail(e)
        else:
            self.fail(TransferFailed("held up"))

    def arrive_late(self) -> None:
        """A piece that was held up arrives; raises TransferFailed when it is refused."""
        self._sink.accept(*self.held.popleft())

    @staticmethod
    def _packed(job: _Job) -> NDArray[np.uint8]:
        assert job.header is not None
        assert job.pack is not None
        payload = np.zeros(job.header.nbytes, np.uint8)
        job.pack(payload)
        payload.flags.writeable = False
        return payload


def _resolve(future: Future[Any], value: object) -> None:
    if not future.done():
        future.set_result(value)


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
