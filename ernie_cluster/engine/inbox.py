"""Receiving side: KV into leased blocks (decode, or a prefix of a prompt) and embeddings into waiting prompts (prefill).

What arrives names its request and attempt; anything for a lease that ended, or of another attempt, is refused and
never touches a block. A sender first *claims*: the answer comes when the path is reserved here, so no work starts
before every stage has its place.

    claim   prefill -> decode    answered with how many blocks the prefix cache here holds already
            vision  -> prefill   answered with those of its pictures whose embeddings are wanted
    commit  prefill -> decode    all pieces are here: the sequence goes on from the given tokens

What a source of a prefix says is in `fetching`.

Runs on transport threads; takes the engine's lock for each piece, which is short: a piece is at most a few MiB.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ernie_cluster.config.kv_layout import KVLayout
from ernie_cluster.engine.claims import Claim, Claims
from ernie_cluster.engine.engine import Engine
from ernie_cluster.engine.fetching import Fetches
from ernie_cluster.engine.followers import Followers
from ernie_cluster.engine.leases import Lease, LeaseTable
from ernie_cluster.engine.sequence import Sequence
from ernie_cluster.engine.slices import EMBED_PIECE, KV_PIECE, check_counted, check_filled, failure_of, write_piece
from ernie_cluster.errors import TransferFailed
from ernie_cluster.request import GenerationRequest, Span
from ernie_cluster.transport.base import Message, PieceHeader, Reply


@dataclass(slots=True, eq=False)
class _Expected:
    """A request whose KV is on its way here."""

    request: GenerationRequest
    hashes: list[bytes]
    epoch: int
    is_ready: bool = False
    """Every rank of ours knows the lease, and pieces may come."""


class Inbox:
    """A `transport.base.Sink` for one engine.

    Args:
        engine: takes the sequences.
        leases: of the same block pool.
        layout: of this rank's KV.
        hidden_size: width of an embedding.
        followers: the other ranks here that hold KV heads.
        wall_clock: seconds since the epoch, for the timeline.
    """

    def __init__(
        self,
        engine: Engine,
        leases: LeaseTable,
        layout: KVLayout,
        hidden_size: int,
        followers: Followers,
        *,
        wall_clock: Callable[[], float],
    ) -> None:
        self._engine, self._leases, self._layout = engine, leases, layout
        self._hidden_size, self._followers, self._wall_clock = hidden_size, followers, wall_clock
        leases.recall = self._recall
        self._expected: dict[str, _Expected] = {}
        self._claims = Claims()
        self.fetches = Fetches(engine, self._claims, layout, followers, wall_clock)
        self._begun: dict[str, tuple[int, float]] = {}
        """Prompts with pictures, which may be done before all are offered where some are cached: attempt, deadline."""
        self.bytes_received = 0

    @property
    def num_expected(self) -> int:
        """Requests whose KV is on its way here."""
        return len(self._expected)

    def request_ids(self) -> list[str]:
        """Of those; with the engine's lock held."""
        return list(self._expected)

    # ---- from the replica's control side

    def expect(self, request: GenerationRequest, hashes: list[bytes], epoch: int, reserve_tokens: int) -> None:
        """Lease blocks for a request whose KV will come, and answer a claim that came before.

        Raises:
            ContextTooLong, Overloaded, TransferFailed: see `LeaseTable.grant`.
        """
        with self._engine.lock:
            self.fence(request.request_id, epoch)
            now = self._engine.clock()
            lease = self._leases.grant(
                request.request_id,
                epoch,
                request.num_prompt_tokens + len(request.output_token_ids),
                hashes,
                reserve_tokens,
                now,
                self._engine.scheduler.num_blocks_owed,
                now + request.timeout_s,
            )
            expected = _Expected(request, hashes, epoch)
            self._expected[request.request_id] = expected
            if not self._followers:
                self._ready(expected, lease)
                return
            lease.told = told = self._followers.expect(lease)
            told.add_done_callback(lambda _: self._ready(expected, lease) if failure_of(told) is None else None)

    def open_media(self, sequence: Sequence) -> None:
        """A prompt is admitted here: say which pictures it still needs."""
        with self._engine.lock:
            request_id, epoch = sequence.request_id, sequence.epoch
            needed = [i for i in range(len(sequence.request.media)) if sequence.needs_media(i)]
            sequence.awaited_media = frozenset(needed)
            if sequence.request.media:
                self._begun[request_id] = epoch, self._engine.clock() + self._leases.timeout_s
            for claim in self._claims.take(request_id, epoch, "claim"):
                wanted = [i for i in needed if i not in sequence.embeds]
                claim.reply({"media": [i for i in wanted if claim.media is None or i in claim.media]})

    def fence(self, request_id: str, epoch: int) -> None:
        """Make way for an attempt: older ones end here without an outcome.

        Raises:
            TransferFailed: the attempt that is here is not older.
        """
        with self._engine.lock:
            self._engine.fence(request_id, epoch)
            self.fetches.fence(request_id, epoch)
            expected = self._expected.get(request_id)
            if expected is not None and expected.epoch < epoch:
                del self._expected[request_id]

    def forget(self, request_id: str, epoch: int | None = None) -> bool:
        """End what waits here for a request, or for one attempt of it; whether it had a lease."""
        with self._engine.lock:
            expected = self._expected.get(request_id)
            if expected is not None and epoch in (None, expected.epoch):
                del self._expected[request_id]
            for claim in self._claims.take(request_id, epoch):
                claim.refuse(f"request {request_id} was ended")
            self.fetches.forget(request_id, epoch)
            return self._leases.end(request_id, epoch)

    def sweep(self, now_s: float) -> list[str]:
        """End leases that nobody kept alive, and the waiting of claims and fetches; the requests whose lease ended."""
        with self._engine.lock:
            late = self._leases.sweep(now_s)
            for request_id in late:
                self._expected.pop(request_id, None)
                self.fetches.forget(request_id)
            self.fetches.sweep(now_s)
            for claim in self._claims.overdue(now_s):
                claim.refuse(f"request {claim.request_id}: no place was reserved in time")
            self._begun = {r: (epoch, end) for r, (epoch, end) in self._begun.items() if end > now_s}
            return late

    # ---- Sink

    def accept(self, header: PieceHeader, payload: NDArray[np.uint8]) -> None:
        """See `Sink`."""
        kind, *detail = header.detail
        with self._engine.lock:
            if kind == KV_PIECE:
                self._accept_kv(header, payload)
            elif kind == EMBED_PIECE:
                self._accept_embeds(header, payload, *detail)
            else:
                raise TransferFailed(f"piece of unknown kind {kind}")
            self.bytes_received += header.nbytes

    def handle(self, message: Message, reply: Reply) -> None:
        """See `Sink`."""
        request_id, epoch = str(message["request_id"]), int(message["epoch"])  # type: ignore[arg-type]
        if message["type"] in ("claim", "offer"):
            self._claim(request_id, epoch, message, reply)
        elif message["type"] in ("prefix", "decline"):
            self._fetched(request_id, epoch, message, reply)
        elif message["type"] == "commit":
            output = [int(t) for t in message["output"]]  # type: ignore[union-attr, arg-type]
            self._commit(request_id, epoch, int(message["num_pieces"]), output, reply)  # type: ignore[arg-type]
        else:
            raise TransferFailed(f"unknown message {message['type']!r}")

    def disconnected(self, peer: str) -> None:
        """See `Sink`. Leases that were being filled run out by their own deadline, or are taken by a new attempt."""

    # ---- inside, with the lock held

    def _accept_kv(self, header: PieceHeader, payload: NDArray[np.uint8]) -> None:
        lease = self._leases.find(header.request_id, header.epoch)
        if header.request_id not in self._expected and header.request_id not in self.fetches:
            raise TransferFailed(f"request {header.request_id}: no KV is expected any more")
        write_piece(self._engine.runner.kv, self._layout, lease, header, payload)
        if lease.first_piece_s is None:
            lease.first_piece_s = self._wall_clock()

    def _accept_embeds(
        self, header: PieceHeader, payload: NDArray[np.uint8], index: int, first_row: int, num_rows: int
    ) -> None:
        sequence = self._engine.sequences.get(header.request_id)
        if sequence is None or sequence.epoch != header.epoch or not 0 <= index < len(sequence.request.media):
            raise TransferFailed(f"request {header.request_id}: no prompt waits for attempt {header.epoch}'s picture")
        total = sequence.request.media[index].num_tokens
        runner = self._engine.runner
        rows = torch.as_tensor(payload).view(runner.dtype).view(-1, self._hidden_size)
        if len(rows) != num_rows or not 0 <= first_row < first_row + num_rows <= total:
            raise TransferFailed(f"request {header.request_id}: {num_rows} rows from {first_row} do not fit {total}")
        if index in sequence.embeds:
            return  # from another vision replica, which was faster
        if index not in sequence.arriving:
            sequence.arriving[index] = (
                torch.empty(total, self._hidden_size, dtype=runner.dtype, device=runner.device),
                torch.zeros(total, dtype=torch.bool),
            )
        embeds, has_come = sequence.arriving[index]
        embeds[first_row : first_row + num_rows] = rows
        has_come[first_row : first_row + num_rows] = True
        if has_come.all():
            sequence.embeds[index] = embeds
            del sequence.arriving[index]
            self._engine.lock.notify_all()

    def _claim(self, request_id: str, epoch: int, message: Message, reply: Reply) -> None:
        engine = self._engine
        with engine.lock:
            expected, sequence = self._expected.get(request_id), engine.sequences.get(request_id)
            epochs = [known.epoch for known in (expected, sequence) if known is not None]
            newest = max((*epochs, self._claims.newest(request_id) or epoch), default=epoch)
            if newest > epoch:
                raise TransferFailed(f"request {request_id}: attempt {epoch} is fenced off by attempt {newest}")
            claim = Claim(request_id, epoch, message, reply, engine.clock() + self._leases.timeout_s)
            if message["type"] == "offer":
                self.fetches.offered(claim)
                return
            self._claims.add(claim)
            if expected is not None and expected.epoch == epoch:
                if expected.is_ready:
                    self._ready(expected, self._leases.find(request_id, epoch))
            elif sequence is not None and sequence.epoch == epoch:
                self.open_media(sequence)
            elif self._begun.get(request_id, (None, 0.0))[0] == epoch:
                for claim in self._claims.take(request_id, epoch, "claim"):
                    claim.reply({"media": []})

    def _fetched(self, request_id: str, epoch: int, message: Message, reply: Reply) -> None:
        with self._engine.lock:
            if message["type"] == "decline":
                self.fetches.declined(request_id, epoch)
                reply({})
            else:
                self.fetches.arrived(request_id, epoch, int(message["num_pieces"]), reply)  # type: ignore[arg-type]

    def _ready(self, expected: _Expected, lease: Lease) -> None:
        """Pieces may come: say so to who has claimed this place."""
        with self._engine.lock:
            expected.is_ready = True
            if self._expected.get(lease.request_id) is expected:
                for claim in self._claims.take(lease.request_id, lease.epoch, "claim"):
                    claim.reply({"cached_blocks": lease.num_shared})

    def _recall(self, lease: Lease) -> None:
        """A lease has ended that followers write under."""

        def forgotten(answer: Future[list[Message]]) -> None:
            if failure_of(answer) is None:  # else their blocks are nobody's, until the gang is replaced
                with self._engine.lock:
                    self._leases.give_back(lease)
                    self._engine.lock.notify_all()

        assert lease.told is not None
        # not before they know it, for messages may overtake each other
        lease.told.add_done_callback(lambda _: self._followers.forget(lease).add_done_callback(forgotten))

    def _commit(self, request_id: str, epoch: int, num_pieces: int, output: list[int], reply: Reply) -> None:
        """Raises TransferFailed when something is missing here; what is missing on other ranks is replied."""
        with self._engine.lock:
            lease = self._leases.find(request_id, epoch)
            expected = self._expected.get(request_id)
            if expected is None:
                raise TransferFailed(f"request {request_id}: its prompt is computed here, no KV is expected")
            check_counted(lease, num_pieces)
            num_computed = expected.request.num_prompt_tokens + len(output) - 1
            check_filled(lease, self._layout, num_computed)
            if not self._followers:
                self._begin(expected, lease, output)
                reply({})
                return
        others = self._followers.complete(lease, num_computed)

        def completed() -> None:
            error = failure_of(others)
            try:
                if error is None:
                    with self._engine.lock:
                        if self._expected.get(request_id) is not expected:
                            raise TransferFailed(f"request {request_id}: attempt {epoch} was ended meanwhile")
                        self._begin(expected, lease, output)
            except TransferFailed as e:
                error = e
            reply({} if error is None else {"error": str(error)})

        others.add_done_callback(lambda _: completed())

    def _begin(self, expected: _Expected, lease: Lease, output: list[int]) -> None:
        """All KV is here: the sequence goes on."""
        request = expected.request
        self._leases.take(request.request_id, lease.epoch)
        del self._expected[request.request_id]
        sequence = Sequence(request, expected.hashes, epoch=lease.epoch, blocks=lease.blocks, is_answering=True)
        sequence.tokens = [*request.prompt_token_ids.tolist(), *output]
        sequence.num_computed = len(sequence.tokens) - 1
        now = self._wall_clock()
        start = lease.first_piece_s or now
        detail = (("bytes", lease.bytes_received), ("pieces", len(lease.pieces)))
        sequence.spans.append(Span("transfer", start, now - start, detail))
        self._engine.scheduler.publish(sequence)
        self._engine.add(sequence)
