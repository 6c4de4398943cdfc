"""One NCCL communicator of two ranks, and the thread that everything of it that may block runs on.

What NCCL does when the peer is gone decides how this is built. Creation blocks until the peer joins, and cupy cannot
interrupt it. The first exchange blocks in `groupEnd` while links are set up. A kernel whose peer on the same host was
killed spins for ever and reports nothing. So the owner's thread only queues work here and looks at marks; a deadline
ends each wait; and `abort`, which may itself hang, runs on a thread of its own and has a deadline, too.

A communicator is always ended by `abort`, never by `destroy`, which would wait for the peer. It is never used again:
the next pair has a new unique id.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ernie_cluster.errors import ReplicaLost, TransferFailed
from ernie_cluster.transport.gpu import Mark
from ernie_cluster.transport.gpu_side import POLL_S, GpuSide, Steps

UniqueId = bytes | tuple[int, ...]
"""As `get_unique_id` of this cupy gives it: older ones give signed numbers."""

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Exchange:
    """One group of sends or receives."""

    parts: Sequence[torch.Tensor]
    """uint8, contiguous, on the device; sizes and order are equal at both ends."""
    mark: Mark | None = None
    """Set when the group is in its stream."""
    error: Exception | None = None


class Pair:
    """Rank 0 sends, rank 1 receives. All methods return at once.

    Args:
        side: of this process.
        uid: from rank 0's `get_unique_id`, used for this pair only.
        rank: 0 or 1.
    """

    def __init__(self, side: GpuSide, uid: UniqueId, rank: int) -> None:
        self._side, self._uid, self._rank = side, uid, rank
        self._exchanges: queue.SimpleQueue[Exchange | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards the communicator's ends of life
        self._comm: Any | None = None
        self._error: Exception | None = None
        self._has_ended = False
        self._is_gone = threading.Event()
        threading.Thread(target=self._run, name=f"nccl-{rank}", daemon=True).start()

    def start(self, parts: Sequence[torch.Tensor]) -> Exchange:
        """Queue a group; the first waits until the communicator is there. What is sent must be in place."""
        exchange = Exchange(parts)
        self._exchanges.put(exchange)
        return exchange

    def finish(self, exchange: Exchange, timeout_s: float, what: str) -> Steps:
        """Until a group is done on this device. Where this ends well the peer has begun it, too.

        Raises:
            TransferFailed: an error of NCCL's, or `timeout_s` has passed; the pair is to be ended.
        """
        deadline_s = time.monotonic() + timeout_s
        while exchange.mark is None or not exchange.mark.is_done():
            error = self._error or exchange.error or self._asynchronous_error()
            if error is not None:
                raise TransferFailed(f"{what}: NCCL says {error}") from error
            if time.monotonic() >= deadline_s:
                raise TransferFailed(
                    f"{what} took more than {timeout_s} s; the peer did not take part, or the link between the GPUs is slow"
                )
            yield POLL_S

    def end(self) -> None:
        """Abort, on a thread of its own. May be called twice."""
        with self._lock:
            if self._has_ended:
                return
            self._has_ended = True
            comm, self._comm = self._comm, None
            if comm is None and self._error is None:  # still being created: the thread that creates it ends it
                self._side.abandon(self)
        self._exchanges.put(None)
        if comm is None:
            self._is_gone.set()  # no kernel of it ever ran
        else:
            threading.Thread(target=self._abort, args=(comm,), name="nccl-abort", daemon=True).start()

    def gone(self) -> Steps:
        """Until no kernel of this pair can touch memory any more.

        Raises:
            ReplicaLost: the abort hangs, and this process is given up.
        """
        timeout_s = self._side.deadlines.abort_s
        deadline_s = time.monotonic() + timeout_s
        while not self._is_gone.is_set():
            if time.monotonic() >= deadline_s:
                reason = f"aborting an NCCL communicator took more than {timeout_s} s; its kernel holds the GPU"
                self._side.give_up(reason)
                raise ReplicaLost(reason)
            yield POLL_S

    def _asynchronous_error(self) -> Exception | None:
        with self._lock:  # an aborted communicator must not be asked
            try:
                if self._comm is not None:
                    self._comm.check_async_error()
            except Exception as e:
                return e
        return None

    def _run(self) -> None:
        gpu = self._side.gpu
        try:
            gpu.bind()
            comm = gpu.nccl.NcclCommunicator(2, self._uid, self._rank)
        except Exception as e:
            with self._lock:
                self._error = e
            self._side.came_back(self)
            return
        with self._lock:
            is_wanted = not self._has_ended
            if is_wanted:
                self._comm = comm
        if not is_wanted:
            self._side.came_back(self)
            with contextlib.suppress(Exception):
                comm.abort()
            return
        stream = gpu.new_stream()
        while (exchange := self._exchanges.get()) is not None and not self._has_ended:
            try:
                self._launch(comm, exchange, stream)
            except Exception as e:
                exchange.error = e
                return  # the pair is broken; its owner ends it

    def _launch(self, comm: Any, exchange: Exchange, stream: Any) -> None:
        gpu, nccl = self._side.gpu, self._side.gpu.nccl
        move = comm.send if self._rank == 0 else comm.recv
        nccl.groupStart()
        try:
            for part in exchange.parts:
                move(part.data_ptr(), part.numel(), nccl.NCCL_UINT8, 1 - self._rank, gpu.pointer(stream))
        finally:
            nccl.groupEnd()
        exchange.mark = gpu.mark(stream)

    def _abort(self, comm: Any) -> None:
        try:
            comm.abort()
        except Exception as e:  # it is over nevertheless: NCCL reports what the peer did
            _log.info("abort of a communicator: %s", e)
        self._is_gone.set()


def uid_to_json(uid: UniqueId) -> str | list[int]:
    """A unique id for a message."""
    return uid.hex() if isinstance(uid, bytes) else [int(number) for number in uid]


def uid_from_json(value: object) -> UniqueId:
    """The reverse; TransferFailed when it is none."""
    try:
        if isinstance(value, str):
            return bytes.fromhex(value)
        if isinstance(value, list):
            return tuple(int(number) for number in value)
    except (TypeError, ValueError):
        pass
    raise TransferFailed("the unique id of a communicator cannot be read; do both ends have one version?")
