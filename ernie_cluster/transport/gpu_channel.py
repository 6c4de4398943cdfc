"""Sender's end of a transport between two GPUs; how the bytes cross is a `Carrier`'s.

Pieces are packed contiguously into staging memory on a stream of their own, beside the engine's, and sealed there (see
`seal`). What has been pushed meanwhile goes as one batch: announced over the control connection, carried, verified and
acknowledged piece by piece. While one batch is on its way the next is packed.

All waiting is done in steps on the link's thread, which never blocks: see `gpu_side.Steps`. When the way breaks while
the peer lives, what was on it fails with TransferFailed and a new way is opened. When that fails too, or the peer is
gone, the channel is over.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, cast

import torch

from ernie_cluster.errors import ReplicaLost, TransferFailed
from ernie_cluster.transport import wire
from ernie_cluster.transport.arena import Arena
from ernie_cluster.transport.base import Message, Pack, Payload, PieceHeader, Tamper
from ernie_cluster.transport.gpu import Mark
from ernie_cluster.transport.gpu_side import GpuSide, Steps, run_through, until, until_still
from ernie_cluster.transport.handshake import Greeting
from ernie_cluster.transport.link import Link
from ernie_cluster.transport.outbox import Outbox, Push, pack_failed
from ernie_cluster.transport.seal import frame_bytes, seal
from ernie_cluster.transport.wire import Kind

_BATCH_BYTES = 16 << 20
_BATCH_PIECES = 256
_MAX_UNDER_WAY = 2
"""Batches; one is carried while the next is packed."""
_LARGEST_OVERHEAD = 128
"""Seal and alignment of a piece."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Pieces that travel together, in this order."""

    number: int
    frames: tuple[tuple[int, int], ...]
    """(offset in the staging memory, bytes) of each."""
    announcement: bytes
    """PIECE frames and the OFFER, for the control connection."""
    packed: Mark
    """All of them are packed and sealed before this."""


class Carrier(Protocol):
    """Moves batches out of its staging memory into the receiver's, to the same offsets. Steps run on one thread."""

    staging: torch.Tensor
    """uint8 [n], on a device."""

    def open(self, link: Link, way: int) -> Steps:
        """Open the way with number `way`; TransferFailed when that cannot be done in time."""
        ...

    def carry(self, link: Link, batch: Batch) -> Steps:
        """Announce and carry a batch that is packed. TransferFailed: the way is broken."""
        ...

    def granted(self, number: int) -> None:
        """The receiver has begun to receive a batch."""
        ...

    def abandon(self) -> Steps:
        """The way is broken: until nothing of it touches the staging memory any more; ReplicaLost when that never ends."""
        ...

    def close(self) -> None:
        """The last call, with bounded waits: give everything back."""
        ...


class GpuChannel:
    """See `base.Channel`. Payloads are given to `pack` as `Gpu.payload` makes them.

    Args:
        greeting: of the receiver, with the socket, which is the channel's from now on.
        side: this process's.
        carrier: the channel's from now on.
        name: for threads and messages.

    Raises:
        TransferFailed: the way cannot be opened, though the peer lives; another transport may work.
        ReplicaLost: the peer is gone.
    """

    def __init__(self, greeting: Greeting, side: GpuSide, carrier: Carrier, name: str) -> None:
        self._side, self._carrier, self._salt, self._name = side, carrier, greeting.salt, name
        self._size = len(carrier.staging)
        self._arena = Arena(self._size)
        self._places: dict[int, int] = {}  # piece on its way -> offset
        self._stream = side.gpu.new_stream()
        self._num_batches = 0
        self._way = 0
        """Number of the open way, 0 while there is none."""
        self._broken: str | None = None
        self.tamper: Tamper | None = None
        self._opened: Future[None] = Future()
        self._link = Link(greeting.sock, f"{name}-send", self._on_frame, self._on_turn, self._on_end)
        self._outbox = Outbox(self._link.wake, self._size // 2 - _LARGEST_OVERHEAD, side.deadlines.stall_s)
        self._progress = self._work()
        self._link.start()
        try:
            self._opened.result(side.deadlines.join_s + side.deadlines.abort_s)
        except BaseException as e:
            self.close()
            if isinstance(e, TimeoutError):
                raise TransferFailed(f"{name}: no way was opened in time") from None
            raise

    @property
    def max_piece_bytes(self) -> int:
        """Half of the staging memory, less what a piece needs beside its bytes."""
        return self._outbox.max_piece_bytes

    def push(self, header: PieceHeader, pack: Pack) -> Future[None]:
        return self._outbox.push(header, pack)

    def call(self, message: Message, timeout_s: float) -> Future[Message]:
        return self._outbox.call(message, time.monotonic() + timeout_s)

    def close(self) -> None:
        self._link.close()

    # ---- on the link's thread

    def _on_turn(self) -> float | None:
        wait_s = self._outbox.expire(time.monotonic())
        reason, self._broken = self._broken, None
        step_s = next(self._progress) if reason is None else self._progress.throw(TransferFailed(reason))
        return min((s for s in (wait_s, step_s) if s is not None), default=None)

    def _work(self) -> Steps:
        self._side.gpu.bind()
        number = 0
        while True:
            number += 1
            self._way = number
            try:
                yield from self._carrier.open(self._link, number)
            except TransferFailed as e:
                self._leave_way(e)
                if not self._opened.done():
                    self._opened.set_exception(e)
                raise ReplicaLost(f"the way to the peer's GPU cannot be opened: {e}") from e
            if not self._opened.done():
                self._opened.set_result(None)
            try:
                yield from self._serve()
            except TransferFailed as e:
                self._leave_way(e)
                yield from self._carrier.abandon()
                yield from until_still(self._side, self._stream, "packing a batch")
                self._arena = Arena(self._size)

    def _serve(self) -> Steps:
        under_way: deque[Steps] = deque()
        while True:
            waits: list[float] = []
            for steps in list(under_way):
                try:
                    step_s = next(steps)
                except StopIteration:
                    under_way.remove(steps)
                else:
                    waits += [] if step_s is None else [step_s]
            batch = self._next_batch() if len(under_way) < _MAX_UNDER_WAY else None
            if batch is not None:
                under_way.append(self._carry(batch))
            elif not self._send_call():
                yield min(waits, default=None)

    def _carry(self, batch: Batch) -> Steps:
        # offered only when it is packed: the engine may still have to compute what is sent
        yield from until(batch.packed, self._side.deadlines.stall_s, "packing a batch on the device")
        yield from self._carrier.carry(self._link, batch)

    def _next_batch(self) -> Batch | None:
        frames: list[tuple[int, int]] = []
        announcement, total = bytearray(), 0
        with self._side.gpu.on(self._stream):
            while isinstance(job := self._outbox.head(), Push) and len(frames) < _BATCH_PIECES:
                if self._link.is_closing:
                    break
                nbytes = frame_bytes(job.header.nbytes)
                if frames and total + nbytes > _BATCH_BYTES:
                    break
                offset = self._arena.allocate(nbytes)
                if offset is None:
                    break
                piece = self._pack(job, offset, nbytes) if self._outbox.take(job) else None
                if piece is None:
                    self._arena.free(offset)
                    continue
                self._places[job.number] = offset
                frames.append((offset, nbytes))
                total += nbytes
                announcement += piece
                self._outbox.sent(job, time.monotonic())
        if not frames:
            return None
        self._num_batches += 1
        announcement += wire.encode(Kind.OFFER, wire.with_id(self._num_batches))
        return Batch(self._num_batches, tuple(frames), bytes(announcement), self._side.gpu.mark(self._stream))

    def _pack(self, job: Push, offset: int, nbytes: int) -> bytes | None:
        """Pack and seal a piece; its PIECE frame, or None when that failed."""
        frame = self._carrier.staging[offset : offset + nbytes]
        try:
            job.pack(self._side.gpu.payload(frame[: job.header.nbytes]))
            seal(frame, job.header.nbytes, job.number, self._salt)
            if self.tamper is not None and not self.tamper(cast(Payload, frame[: job.header.nbytes])):
                raise TransferFailed("dropped on purpose")  # a batch has no gaps, so here it is told
            return wire.encode(Kind.PIECE, wire.encode_piece(job.number, offset, 0, job.header))
        except Exception as e:
            job.future.set_exception(pack_failed(job.header, e))
            return None

    def _send_call(self) -> bool:
        """Send the next call, if it is the turn of one: calls must not overtake pieces. Whether anything was done."""
        job = self._outbox.head()
        if job is None or isinstance(job, Push) or self._places:
            return False
        if self._outbox.take(job):
            self._link.send(wire.encode(Kind.CALL, wire.with_id(job.number, job.body)))
        return True

    def _leave_way(self, reason: TransferFailed) -> None:
        """Fail what is on the way, and tell the peer."""
        _log.warning("%s: the way is broken: %s", self._name, reason)
        self._link.send(broken(self._way, str(reason)))
        self._way = 0
        places, self._places = self._places, {}
        for number in places:
            self._outbox.settle_piece(number, TransferFailed(f"the way broke: {reason}"))

    def _on_frame(self, kind: int, body: bytes) -> None:
        if kind == Kind.BROKEN:
            message = wire.decode_json(body)
            if message.get("way") == self._way:
                self._broken = f"the peer says: {message.get('reason')}"
            return
        number, tail = wire.split_id(body)
        if kind == Kind.GRANT:
            self._carrier.granted(number)
        elif kind == Kind.ACK:
            self._settle_piece(number, None)
        elif kind == Kind.REPLY:
            self._outbox.settle_call(number, wire.decode_json(tail))
        elif kind == Kind.FAIL:
            error = TransferFailed(tail.decode(errors="replace"))
            if not self._settle_piece(number, error):
                self._outbox.settle_call(number, error)
        else:
            raise TransferFailed(f"frame of kind {kind} makes no sense to a sender; do both ends have one version?")

    def _settle_piece(self, number: int, error: TransferFailed | None) -> bool:
        offset = self._places.pop(number, None)
        if offset is not None:
            self._arena.free(offset)
            self._outbox.settle_piece(number, error)
        return offset is not None

    def _on_end(self, reason: str) -> None:
        lost = ReplicaLost(f"GPU channel is down: {reason}")
        self._outbox.end(str(lost))
        if not self._opened.done():
            self._opened.set_exception(lost)
        self._progress.close()
        run_through(until_still(self._side, self._stream, "packing a batch"))
        self._carrier.close()


def broken(way: int, reason: str) -> bytes:
    """The BROKEN frame."""
    return wire.encode(Kind.BROKEN, wire.encode_json({"way": way, "reason": reason[:2000]}))
