"""One connected Unix socket and the thread that serves it: frames in, frames out, deadlines between.

Knows frames, not what they mean: both ends of the shared-memory transport use it with callbacks of their own.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
import socket
import threading
from collections.abc import Callable

from ernie_cluster.errors import ReplicaError, ReplicaLost
from ernie_cluster.transport.base import CLOSE_TIMEOUT_S
from ernie_cluster.transport.wire import FrameReader

_READ_BYTES = 1 << 16
_MAX_BACKLOG_BYTES = 64 << 20
"""A peer that lets this much pile up does not read any more."""

_log = logging.getLogger(__name__)


class Link:
    """Owns the socket, an eventfd to be woken by, and the thread; all three are given back when the thread ends.

    The thread never blocks in a write, so two ends that write to each other at once cannot lock up: what the socket
    does not take is kept and sent when it has room.

    Args:
        sock: connected, and the link's from now on.
        name: of the thread.
        on_frame: kind and body of a frame that has come. A ReplicaError from here or `on_turn` ends the link.
        on_turn: does one piece of work, after what had come was read; returns the seconds to wait for the next turn,
            or None to be called again when something happens.
        on_end: the link is down, and why; the last call.
    """

    def __init__(
        self,
        sock: socket.socket,
        name: str,
        on_frame: Callable[[int, bytes], None],
        on_turn: Callable[[], float | None],
        on_end: Callable[[str], None],
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._on_frame = on_frame
        self._on_turn = on_turn
        self._on_end = on_end
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()  # guards the socket's write side, the backlog, and both ends of life
        self._backlog = bytearray()
        self._is_closing = False
        self._is_down = False
        self._reader = FrameReader()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin to call the callbacks, all on the link's thread."""
        self._thread.start()

    @property
    def is_closing(self) -> bool:
        """`close` was called."""
        return self._is_closing

    @property
    def backlog_bytes(self) -> int:
        """Bytes that wait for the peer to read."""
        return len(self._backlog)

    def send(self, frame: bytes, fds: tuple[int, ...] = ()) -> None:
        """Send a frame; from any thread, never blocks, and does nothing when the link is down.

        Args:
            fds: descriptors that the peer gets copies of; only with the first frame of a link.
        """
        with self._lock:
            if self._is_down:
                return
            sent = 0
            if not self._backlog:
                try:
                    sent = socket.send_fds(self._sock, [frame], fds) if fds else self._sock.send(frame)
                except BlockingIOError:
                    pass
                except OSError:
                    return  # the thread reads what came before the end, and the end itself
            if sent < len(frame):
                self._backlog += frame[sent:]
                os.eventfd_write(self._wake_fd, 1)

    def wake(self) -> None:
        """Let the thread take a turn; from any thread."""
        with self._lock:
            if not self._is_down:
                os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        """End the link and wait for its thread, unless called on it; from any thread, any number of times."""
        self._is_closing = True
        self.wake()
        if self._thread is not threading.current_thread():
            self._thread.join(CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        reason = "closed on this side"
        poll = select.poll()
        poll.register(self._wake_fd, select.POLLIN)
        poll.register(self._sock, select.POLLIN)
        try:
            while not self._is_closing:
                self._wait(poll, self._on_turn())
        except (OSError, ReplicaError) as e:
            reason = str(e)
        except Exception as e:
            _log.exception("%s: unexpected error", self._thread.name)
            reason = f"unexpected {type(e).__name__}: {e}"
        finally:
            with self._lock:
                self._is_down = True
                with contextlib.suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)  # the peer sees the end even if a forked child has the socket
                self._sock.close()
                os.close(self._wake_fd)
            self._on_end(reason)

    def _wait(self, poll: select.poll, wait_s: float | None) -> None:
        if len(self._backlog) > _MAX_BACKLOG_BYTES:
            raise ReplicaLost(f"the peer does not read: more than {_MAX_BACKLOG_BYTES} bytes wait for it")
        poll.modify(self._sock, select.POLLIN | select.POLLOUT if self._backlog else select.POLLIN)
        for fd, event in poll.poll(None if wait_s is None else math.ceil(wait_s * 1000)):
            if fd == self._wake_fd:
                os.eventfd_read(fd)
                continue
            if event & select.POLLOUT:
                self._flush()
            if event & ~select.POLLOUT:
                self._read()

    def _read(self) -> None:
        data = self._sock.recv(_READ_BYTES)
        if not data:
            raise ReplicaLost("the peer has closed the connection or died")
        for kind, body in self._reader.feed(data):
            self._on_frame(kind, body)

    def _flush(self) -> None:
        with self._lock, contextlib.suppress(BlockingIOError):
            del self._backlog[: self._sock.send(self._backlog)]
