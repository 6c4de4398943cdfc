"""Transport between two processes of one Linux host: staging memory for payloads, a Unix socket for frames.

The receiving side makes one anonymous memory file (memfd) per sender and passes it over the socket. No name exists in
/dev/shm, so nothing is left behind however either process dies. The sender's thread packs into a free range of it and
announces the range with a checksum; the receiver's thread verifies, lets the sink copy the bytes to their place, and
acknowledges; the range is then free. The two threads work on different pieces at the same time.

Why a stale sender cannot touch a newer lease: it never has the KV cache mapped, only its own staging memory, which one
thread of one sender writes. Bytes reach the cache by `Sink.accept` alone, which has checked the epoch before.

The address names the socket and holds a token. A sender must know the token and run under the receiver's uid; the
sender checks the uid too, since anybody may take the name of a socket that has died.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from ernie_cluster.errors import ReplicaLost, TransferFailed
from ernie_cluster.transport import inbox, wire
from ernie_cluster.transport.arena import Arena
from ernie_cluster.transport.base import (
    CLOSE_TIMEOUT_S,
    HANDSHAKE_TIMEOUT_S,
    STALL_TIMEOUT_S,
    Message,
    Pack,
    PieceHeader,
    Sink,
    Tamper,
)
from ernie_cluster.transport.link import Link
from ernie_cluster.transport.outbox import Outbox, Push, pack_failed
from ernie_cluster.transport.staging import Staging, check_peer_uid, create_memory
from ernie_cluster.transport.wire import Kind

STAGING_BYTES = 64 << 20
"""Address space per sender; memory is taken only as far as pieces were in flight at once."""
_MAX_UNACKNOWLEDGED = 1024
_WINDOW_BYTES = 4 << 20
"""Pieces on their way take at most this much, or are two: so the receiver finds them in a cache."""
_MAX_BACKLOG_BYTES = 1 << 20
"""No further job is started while this much waits for a receiver that does not read."""
_ACCEPT_PAUSE_S = 0.1
"""Wait before accepting again when the process has no descriptor left."""


class SharedMemoryChannel:
    """Sender's end, see `base.Channel`.

    Args:
        address: of a `SharedMemoryReceiver` on this host.
        peer: what the receiver's sink knows this sender by.
        stall_timeout_s: a receiver that leaves a piece unacknowledged for this long is lost.

    Raises:
        ReplicaLost: nobody listens there.
        TransferFailed: the receiver refuses this sender, or is not what it claims to be.
    """

    def __init__(self, address: str, peer: str, stall_timeout_s: float = STALL_TIMEOUT_S) -> None:
        sock, self._staging = _connect(address, peer)
        size = len(self._staging.bytes)
        self._arena = Arena(size)
        self._places: dict[int, tuple[int, int]] = {}  # unacknowledged piece -> (offset in the staging memory, bytes)
        self._bytes_in_flight = 0
        self.tamper: Tamper | None = None
        self._link = Link(sock, f"kv-to-{address.split(':')[1]}", self._on_frame, self._on_turn, self._on_end)
        self._outbox = Outbox(self._link.wake, max_piece_bytes=size // 2, stall_timeout_s=stall_timeout_s)
        self._link.start()

    @property
    def max_piece_bytes(self) -> int:
        """Half of the staging memory, so that one piece can be packed while another is read."""
        return self._outbox.max_piece_bytes

    def push(self, header: PieceHeader, pack: Pack) -> Future[None]:
        return self._outbox.push(header, pack)

    def call(self, message: Message, timeout_s: float) -> Future[Message]:
        return self._outbox.call(message, time.monotonic() + timeout_s)

    def close(self) -> None:
        self._link.close()

    def _on_turn(self) -> float | None:
        wait_s = self._outbox.expire(time.monotonic())
        job = self._outbox.head()
        if (
            job is None
            or self._outbox.num_unacknowledged >= _MAX_UNACKNOWLEDGED
            or self._link.backlog_bytes >= _MAX_BACKLOG_BYTES
        ):
            return wait_s
        if not isinstance(job, Push):
            if self._outbox.take(job):
                self._link.send(wire.encode(Kind.CALL, wire.with_id(job.number, job.body)))
            return 0.0
        if len(self._places) >= 2 and self._bytes_in_flight + job.header.nbytes > _WINDOW_BYTES:
            return wait_s
        offset = self._arena.allocate(job.header.nbytes)
        if offset is None:
            return wait_s
        if not (self._outbox.take(job) and self._send(job, offset)):
            self._arena.free(offset)
        return 0.0

    def _send(self, job: Push, offset: int) -> bool:
        payload = self._staging.bytes[offset : offset + job.header.nbytes]
        try:
            job.pack(payload)
            frame = wire.encode(Kind.PIECE, wire.encode_piece(job.number, offset, wire.checksum(payload), job.header))
            is_sent = self.tamper is None or self.tamper(payload)
        except Exception as e:
            job.future.set_exception(pack_failed(job.header, e))
            return False
        self._places[job.number] = offset, job.header.nbytes
        self._bytes_in_flight += job.header.nbytes
        self._outbox.sent(job, time.monotonic())
        if is_sent:
            self._link.send(frame)
        return True

    def _on_frame(self, kind: int, body: bytes) -> None:
        number, tail = wire.split_id(body)
        place = self._places.pop(number, None)
        if place is not None:
            self._arena.free(place[0])
            self._bytes_in_flight -= place[1]
        if kind == Kind.ACK:
            self._outbox.settle_piece(number)
        elif kind == Kind.REPLY:
            self._outbox.settle_call(number, wire.decode_json(tail))
        elif kind == Kind.FAIL:
            error = TransferFailed(tail.decode(errors="replace"))
            self._outbox.settle_call(number, error) if place is None else self._outbox.settle_piece(number, error)
        else:
            raise TransferFailed(f"frame of kind {kind} makes no sense to a sender; do both ends have one version?")

    def _on_end(self, reason: str) -> None:
        self._staging.close()
        self._outbox.end(f"shared-memory channel is down: {reason}")


class SharedMemoryReceiver:
    """Receiving end, see `base.Receiver`: one thread that accepts connections, and one for each sender.

    Args:
        sink: called on the senders' threads.
        staging_bytes: address space for each sender's payloads; a piece may take half of it.
    """

    def __init__(self, sink: Sink, staging_bytes: int = STAGING_BYTES) -> None:
        name, self._token = f"ernie-kv-{secrets.token_hex(8)}", secrets.token_hex(16)
        self.address = f"shm:{name}:{self._token}"
        self._sink = sink
        self._staging_bytes = staging_bytes
        self._lock = threading.Lock()
        self._connections: set[_Connection] = set()
        self._is_closing = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(f"\0{name}")
        self._listener.listen()
        self._thread = threading.Thread(target=self._accept, name=f"kv-accept-{name}", daemon=True)
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
            connection.close()

    def _accept(self) -> None:
        while not self._is_closing.is_set():
            try:
                sock, _ = self._listener.accept()
            except OSError:
                self._is_closing.wait(_ACCEPT_PAUSE_S)
                continue
            try:
                check_peer_uid(sock)
                connection = _Connection(sock, self._sink, self._token, self._staging_bytes, self._forget)
            except (OSError, TransferFailed):
                sock.close()
                continue
            with self._lock:
                self._connections.add(connection)
            connection.start()

    def _forget(self, connection: _Connection) -> None:
        with self._lock:
            self._connections.discard(connection)


class _Connection:
    """One sender, seen from the receiver: its link and its staging memory."""

    def __init__(
        self, sock: socket.socket, sink: Sink, token: str, staging_bytes: int, forget: Callable[[_Connection], None]
    ) -> None:
        self._sink = sink
        self._token = token
        self._staging_bytes = staging_bytes
        self._forget = forget
        self._peer: str | None = None  # until the handshake
        self._staging: Staging | None = None
        self._deadline_s = time.monotonic() + HANDSHAKE_TIMEOUT_S
        self._link = Link(sock, f"kv-from-{sock.fileno()}", self._on_frame, self._on_turn, self._on_end)

    def start(self) -> None:
        self._link.start()

    def close(self) -> None:
        self._link.close()

    def _on_turn(self) -> float | None:
        if self._peer is not None:
            return None
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise TransferFailed(f"no handshake within {HANDSHAKE_TIMEOUT_S} s")
        return left_s

    def _on_frame(self, kind: int, body: bytes) -> None:
        if self._staging is None:
            self._greet(kind, body)
        elif kind == Kind.PIECE:
            number, offset, digest, header = wire.decode_piece(body)
            payload = self._staging.bytes[offset : offset + header.nbytes]
            refusal = inbox.accept(self._sink, header, digest, payload)
            if refusal is None:
                self._link.send(wire.encode(Kind.ACK, wire.with_id(number)))
            else:
                self._fail(number, refusal)
        elif kind == Kind.CALL:
            number, tail = wire.split_id(body)
            refusal = inbox.handle(self._sink, wire.decode_json(tail), partial(self._reply, number))
            if refusal is not None:
                self._fail(number, refusal)
        else:
            raise TransferFailed(f"frame of kind {kind} makes no sense to a receiver; do both ends have one version?")

    def _greet(self, kind: int, body: bytes) -> None:
        hello = wire.decode_json(body) if kind == Kind.HELLO else {}
        if not hmac.compare_digest(str(hello.get("token")).encode(errors="replace"), self._token.encode()):
            raise TransferFailed("wrong token")
        if hello.get("version") != wire.VERSION:
            raise TransferFailed(f"sender speaks version {hello.get('version')}, this receiver {wire.VERSION}")
        fd = create_memory(self._staging_bytes)
        try:
            self._staging = Staging(fd, self._staging_bytes, writable=False)
            welcome: Message = {"version": wire.VERSION, "staging_bytes": self._staging_bytes}
            self._link.send(wire.encode(Kind.WELCOME, wire.encode_json(welcome)), fds=(fd,))
        finally:
            os.close(fd)
        self._peer = str(hello.get("peer"))

    def _reply(self, number: int, message: Message) -> None:
        try:
            frame = wire.encode(Kind.REPLY, wire.with_id(number, wire.encode_json(message)))
        except TransferFailed as e:
            self._fail(number, f"the reply cannot be sent: {e}")
        else:
            self._link.send(frame)

    def _fail(self, number: int, reason: str) -> None:
        self._link.send(wire.encode(Kind.FAIL, wire.with_id(number, reason.encode(errors="replace"))))

    def _on_end(self, reason: str) -> None:
        self._forget(self)
        if self._staging is not None:
            self._staging.close()
        if self._peer is not None:
            self._sink.disconnected(self._peer)


def _connect(address: str, peer: str) -> tuple[socket.socket, Staging]:
    """Handshake of a sender; the socket and the memory are the caller's."""
    scheme, name, token = [*address.split(":"), "", ""][:3]
    if scheme != "shm" or not token:
        raise TransferFailed("this is not the address of a shared-memory receiver, shm:<name>:<token>")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    fds: list[int] = []
    try:
        sock.settimeout(HANDSHAKE_TIMEOUT_S)
        sock.connect(f"\0{name}")
        check_peer_uid(sock)
        hello: Message = {"version": wire.VERSION, "token": token, "peer": peer}
        sock.sendall(wire.encode(Kind.HELLO, wire.encode_json(hello)))
        data, fds, _, _ = socket.recv_fds(sock, 4096, 1, socket.MSG_CMSG_CLOEXEC)
        frames = list(wire.FrameReader().feed(data))
        if len(frames) != 1 or frames[0][0] != Kind.WELCOME or len(fds) != 1:
            raise TransferFailed(
                f"{name} refused the handshake: it is closing, restarted with a new token, or of another version; "
                "ask the replica for its address again"
            )
        welcome = wire.decode_json(frames[0][1])
        return sock, Staging(fds[0], int(str(welcome["staging_bytes"])), writable=True)
    except BaseException as e:
        sock.close()
        if isinstance(e, OSError):
            raise ReplicaLost(f"{name} cannot be reached: {e}; its process has ended or stands still") from e
        raise
    finally:
        for fd in fds:
            os.close(fd)
