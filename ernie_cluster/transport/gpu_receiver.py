"""Receiving end of the transports between two GPUs: one listener, and a connection with a thread for each sender.

A batch is fetched into staging memory by the connection's `Fetcher`, verified on the device, and given to the sink piece
by piece on the stream that the engine computes on: so the engine's later work sees it without waiting, and nothing but
a whole, verified piece of the right lease ever reaches the KV cache. A batch whose way breaks is dropped unseen.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

import torch

from ernie_cluster.errors import TransferFailed
from ernie_cluster.transport import inbox, wire
from ernie_cluster.transport.base import CLOSE_TIMEOUT_S, HANDSHAKE_TIMEOUT_S, Message, PieceHeader, Sink
from ernie_cluster.transport.gpu_channel import broken
from ernie_cluster.transport.gpu_side import GpuSide, Steps, until
from ernie_cluster.transport.handshake import Door
from ernie_cluster.transport.keepalive import watch
from ernie_cluster.transport.link import Link
from ernie_cluster.transport.seal import damage, frame_bytes
from ernie_cluster.transport.wire import Kind

_ACCEPT_PAUSE_S = 0.1
"""Wait before accepting again when the process has no descriptor left."""
_MAX_STRANGERS = 64
"""Connections in the middle of their handshake."""

_log = logging.getLogger(__name__)

Piece = tuple[int, int, PieceHeader]
"""Number, offset in the staging memory, header."""


class Fetcher(Protocol):
    """Brings one sender's batches into staging memory. Steps run on one thread."""

    staging: torch.Tensor
    """uint8 [n], on the device."""

    @property
    def welcome(self) -> Message:
        """What the sender must know."""
        ...

    def open(self, link: Link, join: Message) -> Steps:
        """Open the way that a JOIN asks for; TransferFailed when that cannot be done in time."""
        ...

    def fetch(self, link: Link, number: int, frames: list[torch.Tensor]) -> Steps:
        """Until the frames of a batch, parts of `staging`, are there; TransferFailed: the way is broken."""
        ...

    def abandon(self) -> Steps:
        """The way is broken: until nothing can touch the staging memory any more; ReplicaLost when it never will."""
        ...

    def close(self) -> None:
        """The last call, with bounded waits: give everything back."""
        ...


MakeFetcher = Callable[[GpuSide, int], Fetcher]
"""From this process's side and the bytes of staging memory."""


class GpuReceiver:
    """See `base.Receiver`. The sink's payloads are as `Gpu.payload` makes them.

    Args:
        sink: called on the senders' threads, with the engine's stream as the current one.
        side: of this process.
        host: address to listen on, as other hosts reach it.
        transports: how a sender's bytes may come, by name.
        staging_bytes: device memory for each sender.
    """

    def __init__(
        self, sink: Sink, side: GpuSide, host: str, transports: Mapping[str, MakeFetcher], staging_bytes: int
    ) -> None:
        self.sink, self.side, self.transports, self.staging_bytes = sink, side, transports, staging_bytes
        self.token = secrets.token_hex(16)
        self._lock = threading.Lock()
        self._connections: set[_Connection] = set()
        self._is_closing = threading.Event()
        self._listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        port = self._listener.getsockname()[1]
        self.address = f"gpu:{host}:{port}:{self.token}"
        self._thread = threading.Thread(target=self._accept, name=f"gpu-accept-{port}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._is_closing.set()
        with contextlib.suppress(OSError):  # closed before
            self._listener.shutdown(socket.SHUT_RDWR)  # ends the accept
        self._thread.join(CLOSE_TIMEOUT_S)
        self._listener.close()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.link.close()

    def forget(self, connection: _Connection) -> None:
        with self._lock:
            self._connections.discard(connection)

    def _accept(self) -> None:
        while not self._is_closing.is_set():
            try:
                sock, _ = self._listener.accept()
                watch(sock)
            except OSError:
                self._is_closing.wait(_ACCEPT_PAUSE_S)
                continue
            with self._lock:
                num_strangers = sum(connection.is_stranger for connection in self._connections)
            if num_strangers >= _MAX_STRANGERS:
                sock.close()
                continue
            connection = _Connection(sock, self)
            with self._lock:
                self._connections.add(connection)
            connection.link.start()


class _Connection:
    """One sender, seen from the receiver."""

    def __init__(self, sock: socket.socket, receiver: GpuReceiver) -> None:
        self._receiver, self._sink, self._side = receiver, receiver.sink, receiver.side
        self._door = Door(receiver.token)
        self._peer: str | None = None  # until the handshake
        self._fetcher: Fetcher | None = None
        self._pieces: list[Piece] = []  # announced since the last offer
        self._batches: deque[tuple[int, list[Piece]]] = deque()
        self._join: Message | None = None
        self._way: object = None
        """Number of the open way."""
        self._broken: str | None = None
        self.link = Link(sock, f"gpu-from-{sock.fileno()}", self._on_frame, self._on_turn, self._on_end)
        self._progress = self._work()
        self.link.send(self._door.challenge())

    @property
    def is_stranger(self) -> bool:
        """It has not proved itself yet."""
        return self._peer is None

    # ---- frames

    def _on_frame(self, kind: int, body: bytes) -> None:
        if self._peer is None:
            self._greet(kind, body)
        elif kind == Kind.PIECE:
            number, offset, _, header = wire.decode_piece(body)
            self._pieces.append((number, offset, header))
        elif kind == Kind.OFFER:
            number, _ = wire.split_id(body)
            self._batches.append((number, self._pieces))
            self._pieces = []
        elif kind == Kind.CALL:
            number, tail = wire.split_id(body)
            refusal = inbox.handle(self._sink, wire.decode_json(tail), partial(self._reply, number))
            if refusal is not None:
                self._fail(number, refusal)
        elif kind == Kind.JOIN:  # what was offered on an older way will never come
            self._join, self._pieces = wire.decode_json(body), []
            self._batches.clear()
        elif kind == Kind.BROKEN:
            message = wire.decode_json(body)
            if self._way is not None and message.get("way") == self._way:
                self._broken = f"the peer says: {message.get('reason')}"
        else:
            raise TransferFailed(f"frame of kind {kind} makes no sense to a receiver; do both ends have one version?")

    def _greet(self, kind: int, body: bytes) -> None:
        self._door.admit(kind, body, {})  # before any memory is taken
        hello = wire.decode_json(body)
        make = self._receiver.transports.get(str(hello.get("transport")))
        if make is None:
            raise TransferFailed(f"transport {hello.get('transport')!r} is not offered here")
        self._side.gpu.bind()
        self._fetcher = make(self._side, self._receiver.staging_bytes)
        welcome: Message = {"staging_bytes": self._receiver.staging_bytes, **self._fetcher.welcome}
        self.link.send(self._door.admit(kind, body, welcome))
        self._peer = str(hello.get("peer"))

    def _reply(self, number: int, message: Message) -> None:
        try:
            frame = wire.encode(Kind.REPLY, wire.with_id(number, wire.encode_json(message)))
        except TransferFailed as e:
            self._fail(number, f"the reply cannot be sent: {e}")
        else:
            self.link.send(frame)

    def _fail(self, number: int, reason: str) -> None:
        self.link.send(wire.encode(Kind.FAIL, wire.with_id(number, reason.encode(errors="replace"))))

    # ---- work in steps

    def _on_turn(self) -> float | None:
        reason, self._broken = self._broken, None
        return next(self._progress) if reason is None else self._progress.throw(TransferFailed(reason))

    def _work(self) -> Steps:
        deadline_s = time.monotonic() + HANDSHAKE_TIMEOUT_S
        while self._fetcher is None:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TransferFailed(f"no handshake within {HANDSHAKE_TIMEOUT_S} s")
            yield left_s
        stream = self._side.gpu.new_stream()
        while True:
            while self._join is None:
                yield None
            join, self._join = self._join, None
            self._way = join.get("way")
            try:
                yield from self._fetcher.open(self.link, join)
                while True:
                    while not self._batches:
                        yield None
                    yield from self._receive(self._fetcher, stream, *self._batches.popleft())
            except TransferFailed as e:
                _log.warning("the way from %s is broken: %s", self._peer, e)
                self.link.send(broken(int(str(self._way)), str(e)))
                self._way = None
                yield from self._fetcher.abandon()
                # the sink's copies out of staging memory must be done before a new way writes there
                yield from until(self._side.gpu.mark(None), self._side.deadlines.transfer_s, "the engine's own work")

    def _receive(self, fetcher: Fetcher, stream: object, batch: int, pieces: list[Piece]) -> Steps:
        gpu, timeout_s = self._side.gpu, self._side.deadlines.transfer_s
        frames = [_frame(fetcher.staging, piece) for piece in pieces]
        yield from fetcher.fetch(self.link, batch, frames)
        with gpu.on(stream):
            found = [damage(f, h.nbytes, n, self._door.salt) for f, (n, _, h) in zip(frames, pieces, strict=True)]
            damages = gpu.to_host(torch.cat(found))
        yield from until(gpu.mark(stream), timeout_s, "verifying a batch on the device")
        with gpu.on(None):
            answers = [
                self._accept(frame, header, int(bad))
                for frame, (_, _, header), bad in zip(frames, pieces, damages, strict=True)
            ]
        # not before the sink's copies are done: with the acknowledgement the sender may overwrite the staging memory
        yield from until(gpu.mark(None), timeout_s, "the copy of a batch to its place")
        for (number, _, _), refusal in zip(pieces, answers, strict=True):
            if refusal is None:
                self.link.send(wire.encode(Kind.ACK, wire.with_id(number)))
            else:
                self._fail(number, refusal)

    def _accept(self, frame: torch.Tensor, header: PieceHeader, bad: int) -> str | None:
        if bad:
            return inbox.damaged(header, f"its checksum is off by {bad & (1 << 64) - 1:016x}")
        payload = self._side.gpu.payload(frame[: header.nbytes])
        if hasattr(payload, "flags"):  # a GPU's tensor cannot be made read-only
            payload.flags.writeable = False
        return inbox.give(self._sink, header, payload)

    def _on_end(self, reason: str) -> None:
        self._receiver.forget(self)
        self._progress.close()
        if self._fetcher is not None:
            self._fetcher.close()
        if self._peer is not None:
            self._sink.disconnected(self._peer)


def _frame(staging: torch.Tensor, piece: Piece) -> torch.Tensor:
    """The part of the staging memory that an announced piece takes; TransferFailed when it lies outside."""
    number, offset, header = piece
    end = offset + frame_bytes(max(header.nbytes, 1))
    if header.nbytes < 1 or offset % 8 or end > len(staging):
        raise TransferFailed(
            f"piece {number} of {header.nbytes} bytes at {offset} lies outside the staging memory of {len(staging)} bytes"
        )
    return staging[offset:end]
