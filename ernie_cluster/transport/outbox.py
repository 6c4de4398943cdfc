"""What a channel owes its caller: jobs in turn, pieces on their way, calls without a reply.

Jobs of one request go out in their order; requests take turns, so that a small hand-over waits for one piece of each large
one, not for all of them.

The books that all channels share; it moves nothing itself and reads no clock.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from ernie_cluster.errors import PeerSilent, ReplicaLost, TransferFailed
from ernie_cluster.transport.base import Message, Pack, PieceHeader
from ernie_cluster.transport.wire import encode_json


@dataclass(frozen=True, slots=True, eq=False)
class Push:
    """A piece to send."""

    number: int
    """Names the job on this channel; pushes and calls share the count."""
    header: PieceHeader
    pack: Pack
    future: Future[None]


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A control message to send."""

    number: int
    body: bytes
    """JSON."""
    future: Future[Message]
    deadline_s: float
    """On the clock that `expire` is given."""


class Outbox:
    """One channel's jobs, from `push` and `call` to the settled future. Safe to use from any thread.

    Callers add jobs. The channel's thread looks at `head`, removes it with `take`, and settles it by number. Every
    future is settled exactly once: by an answer, a timeout, its owner's cancel, or `end`.

    Args:
        wake: called after a job was added, to wake the channel's thread.
        max_piece_bytes: larger payloads are refused.
        stall_timeout_s: see `expire`.
    """

    def __init__(self, wake: Callable[[], None], max_piece_bytes: int, stall_timeout_s: float) -> None:
        self.max_piece_bytes = max_piece_bytes
        self._wake = wake
        self._stall_timeout_s = stall_timeout_s
        self._lock = threading.Lock()
        self._last_number = 0
        self._queues: OrderedDict[str, deque[Push | Call]] = OrderedDict()  # by request; whose turn it is comes first
        self._pieces: dict[
            int, tuple[Future[None], float]
        ] = {}  # on their way, with the time they were sent; oldest first
        self._calls: dict[int, Call] = {}  # queued or on their way
        self._end_reason: str | None = None

    def push(self, header: PieceHeader, pack: Pack) -> Future[None]:
        """Queue a piece; one of impossible size fails at once."""
        future: Future[None] = Future()
        if 1 <= header.nbytes <= self.max_piece_bytes:
            self._add(header.request_id, lambda number: Push(number, header, pack, future))
        else:
            _fail(
                future,
                TransferFailed(
                    f"piece {header.piece} of request {header.request_id} has {header.nbytes} bytes, this channel takes "
                    f"1 to {self.max_piece_bytes}; split the hand-over with plan_pieces"
                ),
            )
        return future

    def call(self, message: Message, deadline_s: float) -> Future[Message]:
        """Queue a control message; one that cannot be sent fails at once."""
        future: Future[Message] = Future()
        try:
            body = encode_json(message)
        except TransferFailed as e:
            _fail(future, e)
        else:
            request_id = str(message.get("request_id", ""))
            self._add(request_id, lambda number: Call(number, body, future, deadline_s))
        return future

    def head(self) -> Push | Call | None:
        """The job whose turn it is. It stays until it is taken."""
        with self._lock:
            return next(iter(self._queues.values()))[0] if self._queues else None

    def take(self, job: Push | Call) -> bool:
        """Remove the head job to send it. False when it was cancelled or is overdue, and must not be sent.

        A call that was taken is on its way; a piece is so after `sent`, or failed by whoever took it.
        """
        with self._lock:
            request_id, queue = next(iter(self._queues.items()))
            assert queue[0] is job
            queue.popleft()
            if queue:
                self._queues.move_to_end(request_id)
            else:
                del self._queues[request_id]
            if isinstance(job, Call) and job.number not in self._calls:
                return False
            if not job.future.set_running_or_notify_cancel():
                self._calls.pop(job.number, None)
                return False
            return True

    def sent(self, push: Push, now_s: float) -> None:
        """A piece is on its way."""
        with self._lock:
            self._pieces[push.number] = (push.future, now_s)

    @property
    def num_unacknowledged(self) -> int:
        """Pieces on their way."""
        return len(self._pieces)

    def settle_piece(self, number: int, error: Exception | None = None) -> None:
        """A piece was accepted, or refused with an error."""
        with self._lock:
            future, _ = self._pieces.pop(number, (None, 0.0))
        if future is None:
            return
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    def settle_call(self, number: int, answer: Message | Exception) -> None:
        """A call was answered or refused; after its timeout the answer is dropped."""
        with self._lock:
            call = self._calls.pop(number, None)
        if call is None:
            return
        if isinstance(answer, Exception):
            call.future.set_exception(answer)
        else:
            call.future.set_result(answer)

    def expire(self, now_s: float) -> float | None:
        """Fail overdue calls; seconds until the next deadline, or None when nothing is awaited.

        Raises:
            ReplicaLost: a piece was sent `stall_timeout_s` ago and is not acknowledged.
        """
        with self._lock:
            overdue = [call for call in self._calls.values() if call.deadline_s <= now_s]
            for call in overdue:
                del self._calls[call.number]
            deadlines = [call.deadline_s for call in self._calls.values()]
            if self._pieces:
                _, oldest_s = next(iter(self._pieces.values()))
                deadlines.append(oldest_s + self._stall_timeout_s)
        for call in overdue:
            _fail(call.future, PeerSilent("no reply within the timeout of the call; the peer may still act on it"))
        if self._pieces and deadlines[-1] <= now_s:
            raise ReplicaLost(
                f"a piece was sent {self._stall_timeout_s} s ago and is not acknowledged ({len(self._pieces)} on their "
                "way); the receiver stands still, use another replica"
            )
        return min(deadlines) - now_s if deadlines else None

    def end(self, reason: str) -> None:
        """Fail everything with ReplicaLost, now and for ever. Called by the channel's thread."""
        with self._lock:
            if self._end_reason is not None:
                return
            self._end_reason = reason
            futures: list[Future[Any]] = [future for future, _ in self._pieces.values()]
            futures += [call.future for call in self._calls.values()]
            futures += [job.future for queue in self._queues.values() for job in queue if isinstance(job, Push)]
            self._pieces.clear()
            self._calls.clear()
            self._queues.clear()
        for future in futures:
            _fail(future, ReplicaLost(reason))

    def _add(self, request_id: str, make: Callable[[int], Push | Call]) -> None:
        with self._lock:
            self._last_number += 1
            job = make(self._last_number)
            end_reason = self._end_reason
            if end_reason is None:
                self._queues.setdefault(request_id, deque()).append(job)
                if isinstance(job, Call):
                    self._calls[job.number] = job
        if end_reason is None:
            self._wake()
        else:
            _fail(job.future, ReplicaLost(end_reason))


def _fail(future: Future[Any], error: Exception) -> None:
    """Fail a future, unless its owner has cancelled it."""
    if future.running() or future.set_running_or_notify_cancel():
        future.set_exception(error)


def pack_failed(header: PieceHeader, error: Exception) -> TransferFailed:
    """Why a piece was never sent; the caller's own error is its cause."""
    failed = TransferFailed(f"piece {header.piece} of request {header.request_id} could not be packed: {error!r}")
    failed.__cause__ = error
    return failed
