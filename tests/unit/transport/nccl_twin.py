"""NCCL over Unix sockets, for several threads or processes, with mishaps by plan.

As true as the transport can tell. Creation blocks until the peer comes, and nothing interrupts it. The first group of a
communicator blocks in `groupEnd` until the peer's does. Sends and receives run later, in order, on their stream. A peer
that dies is not reported: the operation hangs until `abort`. `destroy` is never to be called.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import select
import signal
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

_LOOK_S = 0.002


class NcclError(RuntimeError):
    """What cupy raises."""


class Mishaps:
    """What befalls the n-th call of a kind: `{"send": {2: "hang"}}`, counted from 0.

    kinds: uid, init, launch (a group), send, recv, abort, open and copy (IPC)
    mishaps: raise · hang (an operation until its communicator is aborted, else for ever) · kill (this process, SIGKILL)
        · late (0.1 s) · flip (send: one bit)
    """

    def __init__(self, plan: dict[str, dict[int, str]] | None = None) -> None:
        self._plan = plan or {}
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def meet(self, kind: str, aborted: threading.Event | None = None) -> str:
        """The mishap of this call, if any; raising, hanging and dying happen here."""
        with self._lock:
            mishap = self._plan.get(kind, {}).get(self._counts[kind], "")
            self._counts[kind] += 1
        if mishap == "raise":
            raise NcclError(f"{kind} failed by plan")
        if mishap == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if mishap == "hang":
            (aborted or threading.Event()).wait()
        if mishap == "late":
            time.sleep(0.1)
        return mishap


class Stream:
    """Runs what it is given in order, on a thread that lives while there is work."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._work: deque[Callable[[], None]] = deque()
        self._is_running = False

    def put(self, work: Callable[[], None]) -> None:
        with self._lock:
            self._work.append(work)
            if not self._is_running:
                self._is_running = True
                threading.Thread(target=self._run, name="twin-stream", daemon=True).start()

    def mark(self) -> EventMark:
        mark = EventMark()
        self.put(mark.event.set)
        return mark

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._work:
                    self._is_running = False
                    return
                work = self._work.popleft()
            work()


class EventMark:
    def __init__(self) -> None:
        self.event = threading.Event()

    def is_done(self) -> bool:
        return self.event.is_set()


class TwinNccl:
    """The part of `cupy.cuda.nccl` that is used."""

    NCCL_UINT8 = 1

    def __init__(self, mishaps: Mishaps) -> None:
        self.mishaps = mishaps
        self.live: set[TwinCommunicator] = set()
        self._listeners: dict[bytes, socket.socket] = {}
        self._streams: dict[int, Stream] = {}
        self._group = threading.local()

    def pointer(self, stream: Stream) -> int:
        self._streams[id(stream)] = stream
        return id(stream)

    def get_unique_id(self) -> bytes:
        self.mishaps.meet("uid")
        uid = secrets.token_hex(64).encode()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(b"\0" + uid[:64])
        listener.listen()
        self._listeners[uid] = listener
        return uid

    def NcclCommunicator(self, ndev: int, uid: bytes, rank: int) -> TwinCommunicator:
        assert ndev == 2
        assert len(uid) == 128
        self.mishaps.meet("init")
        if rank == 0:
            with self._listeners.pop(uid) as listener:
                sock, _ = listener.accept()
        else:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.connect(b"\0" + uid[:64])
            except OSError as e:
                raise NcclError(f"unhandled system error: {e}") from e
        sock.sendall(b"i")
        if sock.recv(1) != b"i":
            raise NcclError("unhandled system error: the root is gone")
        communicator = TwinCommunicator(self, sock)
        self.live.add(communicator)
        return communicator

    def groupStart(self) -> None:
        self._group.operations = []

    def groupEnd(self) -> None:
        operations, self._group.operations = self._group.operations, None
        self.mishaps.meet("launch", operations[0][0].aborted)
        operations[0][0].connect()
        for communicator, work, pointer in operations:
            communicator.launch(self._streams[pointer], work)

    def add(self, communicator: TwinCommunicator, work: Callable[[], None], stream: int) -> None:
        assert self._group.operations is not None, "sends and receives belong into a group"
        self._group.operations.append((communicator, work, stream))


class TwinCommunicator:
    def __init__(self, nccl: TwinNccl, sock: socket.socket) -> None:
        self._nccl, self._sock = nccl, sock
        self._is_connected = False
        self._running = threading.Semaphore(0)
        self._num_launched = 0
        self.aborted = threading.Event()
        self.async_error: Exception | None = None

    def send(self, pointer: int, count: int, dtype: int, peer: int, stream: int) -> None:
        self._check(dtype, peer, 1)
        self._nccl.add(self, lambda: self._send(pointer, count), stream)

    def recv(self, pointer: int, count: int, dtype: int, peer: int, stream: int) -> None:
        self._check(dtype, peer, 0)
        self._nccl.add(self, lambda: self._recv(pointer, count), stream)

    def check_async_error(self) -> None:
        assert not self.aborted.is_set(), "an aborted communicator is freed"
        if self.async_error is not None:
            raise self.async_error

    def abort(self) -> None:
        self._nccl.mishaps.meet("abort")
        self.aborted.set()
        for _ in range(self._num_launched):
            self._running.acquire()
        self._nccl.live.discard(self)
        self._sock.close()

    def destroy(self) -> None:
        raise AssertionError("destroy waits for the peer")

    # ---- inside

    def _check(self, dtype: int, peer: int, expected: int) -> None:
        assert (dtype, peer) == (TwinNccl.NCCL_UINT8, expected)
        if self.aborted.is_set():
            raise NcclError("invalid argument")

    def connect(self) -> None:
        if not self._is_connected:
            self._write(b"c")
            self._read(bytearray(1))
            if self.aborted.is_set():
                raise NcclError("aborted")
            self._is_connected = True

    def launch(self, stream: Stream, work: Callable[[], None]) -> None:
        self._num_launched += 1

        def run() -> None:
            try:
                work()
            except NcclError as e:
                self.async_error = e
                self.aborted.wait()
            finally:
                self._running.release()

        stream.put(run)

    def _send(self, pointer: int, count: int) -> None:
        mishap = self._nccl.mishaps.meet("send", self.aborted)
        data = bytearray((ctypes.c_uint8 * count).from_address(pointer))
        if mishap == "flip":
            data[count // 2] ^= 1
        self._write(count.to_bytes(8, "little"))
        self._write(data)
        self._read(bytearray(1))

    def _recv(self, pointer: int, count: int) -> None:
        self._nccl.mishaps.meet("recv", self.aborted)
        size = bytearray(8)
        if self._read(size) and int.from_bytes(size, "little") != count:
            raise NcclError(f"truncated: {count} bytes wanted, {int.from_bytes(size, 'little')} sent")
        if self._read((ctypes.c_uint8 * count).from_address(pointer)):
            self._write(b"a")

    def _write(self, data: bytes | bytearray) -> None:
        view = memoryview(data)
        while view and not self.aborted.is_set():
            if select.select([], [self._sock], [], _LOOK_S)[1]:
                with contextlib.suppress(OSError):  # the peer is dead: nobody says so
                    view = view[self._sock.send(view, socket.MSG_DONTWAIT) :]
                    continue
                self.aborted.wait()

    def _read(self, target: Any) -> bool:
        view = memoryview(target).cast("B")
        while view and not self.aborted.is_set():
            if select.select([self._sock], [], [], _LOOK_S)[0]:
                with contextlib.suppress(OSError):
                    num_read = self._sock.recv_into(view, 0, socket.MSG_DONTWAIT)
                    if num_read:
                        view = view[num_read:]
                        continue
                self.aborted.wait()
        return not view
