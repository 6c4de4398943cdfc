"""Transport through a store of immutable objects, such as Ray's: works between any two actors, few large pieces.

How to store an object and how to reach the receiver are arguments, so that no Ray is here. Messages are JSON objects:

    {"kind": "piece", "request_id", "epoch", "piece", "nbytes", "detail", "checksum"}  with one object
    {"kind": "call", "body"}      answered by {"reply": {...}} once the sink has replied
    {"kind": "bye", "peer"}       the channel was closed

Every answer is {"ok": true}, {"reply": {...}} or {"refused": reason}. If a sender dies without a bye, the receiving
actor hears of it (its objects are lost) and says so by `ObjectStoreReceiver.disconnected`.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, cast

import numpy as np

from ernie_cluster.errors import ReplicaLost, TransferFailed
from ernie_cluster.transport import inbox, wire
from ernie_cluster.transport.base import (
    CLOSE_TIMEOUT_S,
    STALL_TIMEOUT_S,
    Message,
    Pack,
    Payload,
    PieceHeader,
    Sink,
    Tamper,
)
from ernie_cluster.transport.outbox import Call, Outbox, Push, pack_failed

MAX_IN_FLIGHT_BYTES = 256 << 20
"""Per channel; the store must hold this much for every pair of replicas, beyond it Ray spills to disk."""
MAX_IN_FLIGHT_PIECES = 4096
"""Per channel; far above what the bytes leave room for, unless pieces are tiny."""

Put = Callable[[Payload], Any]
Deliver = Callable[[Message, list[Any]], "Future[Message]"]


class ObjectStoreChannel:
    """Sender's end, see `base.Channel`.

    Args:
        put: stores a copy of an array, returns a reference to it. Called on the channel's thread.
        deliver: hands a message and references to `ObjectStoreReceiver.receive` of the receiver and returns at once;
            the future fails with ReplicaLost when the receiver is dead. Called on the channel's thread. References
            are dropped when it is done.
        peer: what the receiver's sink knows this sender by.
        max_in_flight_bytes: stored and not yet acknowledged.
        max_in_flight_pieces: likewise.
        max_piece_bytes: half of `max_in_flight_bytes` if None.
        stall_timeout_s: a receiver that leaves a piece unacknowledged for this long is lost.
    """

    def __init__(
        self,
        put: Put,
        deliver: Deliver,
        peer: str,
        *,
        max_in_flight_bytes: int = MAX_IN_FLIGHT_BYTES,
        max_in_flight_pieces: int = MAX_IN_FLIGHT_PIECES,
        max_piece_bytes: int | None = None,
        stall_timeout_s: float = STALL_TIMEOUT_S,
    ) -> None:
        self._put = put
        self._deliver = deliver
        self._peer = peer
        self._max_in_flight_bytes, self._max_in_flight_pieces = max_in_flight_bytes, max_in_flight_pieces
        self._wake = threading.Event()
        self.tamper: Tamper | None = None
        self._lost: str | None = None  # set once, from any thread; ends the channel
        self._in_flight: dict[int, int] = {}  # piece -> bytes
        self._scratch = np.empty(0, np.uint8)  # the largest piece so far, so that packing touches warm pages
        self._outbox = Outbox(self._wake.set, max_piece_bytes or max_in_flight_bytes // 2, stall_timeout_s)
        self._thread = threading.Thread(target=self._run, name=f"objects-from-{peer}", daemon=True)
        self._thread.start()

    @property
    def max_piece_bytes(self) -> int:
        """See the argument."""
        return self._outbox.max_piece_bytes

    def push(self, header: PieceHeader, pack: Pack) -> Future[None]:
        return self._outbox.push(header, pack)

    def call(self, message: Message, timeout_s: float) -> Future[Message]:
        return self._outbox.call(message, time.monotonic() + timeout_s)

    def close(self) -> None:
        self._end("closed on this side")
        if self._thread is not threading.current_thread():
            self._thread.join(CLOSE_TIMEOUT_S)

    def _end(self, reason: str) -> None:
        self._lost = self._lost or reason
        self._wake.set()

    def _run(self) -> None:
        try:
            while True:
                self._wake.clear()  # before looking, so that no wake is missed
                if self._lost is not None:
                    break
                wait_s = self._turn()
                if wait_s != 0.0:
                    self._wake.wait(wait_s)
        except ReplicaLost as e:
            self._lost = str(e)
        finally:
            self._outbox.end(f"object-store channel is down: {self._lost}")
            with contextlib.suppress(Exception):  # the receiver may be gone
                self._deliver({"kind": "bye", "peer": self._peer}, [])

    def _turn(self) -> float | None:
        wait_s = self._outbox.expire(time.monotonic())
        job = self._outbox.head()
        if job is None or not self._is_turn_of(job):
            return wait_s
        if self._outbox.take(job):
            if isinstance(job, Push):
                self._send_piece(job)
            else:
                self._send({"kind": "call", "body": json.loads(job.body)}, [], partial(self._on_reply, job.number))
        return 0.0

    def _is_turn_of(self, job: Push | Call) -> bool:
        if isinstance(job, Call):  # deliveries may overtake each other, calls must not overtake pieces
            return not self._in_flight
        if len(self._in_flight) >= self._max_in_flight_pieces:
            return False
        return sum(self._in_flight.values()) + job.header.nbytes <= self._max_in_flight_bytes

    def _send_piece(self, job: Push) -> None:
        header = job.header
        if len(self._scratch) < header.nbytes:
            self._scratch = np.empty(header.nbytes, np.uint8)
        payload = self._scratch[: header.nbytes]
        try:
            job.pack(payload)
            message = _to_message(header, wire.checksum(payload))
            is_sent = self.tamper is None or self.tamper(payload)
            ref = self._put(payload)
        except Exception as e:
            job.future.set_exception(pack_failed(header, e))
            return
        self._in_flight[job.number] = header.nbytes
        self._outbox.sent(job, time.monotonic())
        if is_sent:
            self._send(message, [ref], partial(self._on_accepted, job.number))

    def _send(self, message: Message, refs: list[Any], on_answer: Callable[[Message | Exception], None]) -> None:
        try:
            delivery = self._deliver(message, refs)
        except Exception as e:
            on_answer(e)
        else:
            delivery.add_done_callback(lambda done: on_answer(_outcome(done)))

    def _on_accepted(self, number: int, answer: Message | Exception) -> None:
        self._in_flight.pop(number, None)
        self._outbox.settle_piece(number, self._error_in(answer))
        self._wake.set()

    def _on_reply(self, number: int, answer: Message | Exception) -> None:
        error = self._error_in(answer)
        self._outbox.settle_call(number, error or cast(dict[str, Message], answer)["reply"])

    def _error_in(self, answer: Message | Exception) -> Exception | None:
        if isinstance(answer, ReplicaLost):
            self._end(str(answer))
            return answer
        if isinstance(answer, Exception):
            return TransferFailed(f"delivery failed: {answer!r}")
        return TransferFailed(str(answer["refused"])) if "refused" in answer else None


class ObjectStoreReceiver:
    """Receiving end, see `base.Receiver`. Has no thread: its actor calls `receive` for what arrives.

    Args:
        sink: called on the threads that call `receive`.
        address: how senders' `deliver` finds this receiver.
    """

    def __init__(self, sink: Sink, address: str) -> None:
        self.address = address
        self._sink = sink
        self._changed = threading.Condition()
        self._num_inside = 0  # threads that may be in the sink
        self._unanswered: set[Future[Message]] = set()
        self._is_closed = False

    def receive(self, message: Message, payload: Payload | None = None) -> Future[Message]:
        """Take one delivered message; verifies and copies in the calling thread, so not on an event loop's.

        Args:
            payload: uint8 [nbytes] of a piece, as it came from the store; may be dropped after the return.

        Returns:
            The answer for the sender: resolved already for a piece, after the sink's reply for a call. Fails with
            ReplicaLost when this receiver is or gets closed.
        """
        answer: Future[Message] = Future()
        with self._changed:
            if self._is_closed:
                answer.set_exception(ReplicaLost(f"receiver {self.address} is closed"))
                return answer
            self._num_inside += 1
            self._unanswered.add(answer)
        try:
            refusal = self._dispatch(message, payload, partial(self._settle, answer))
            if refusal is not None:
                self._settle(answer, {"refused": refusal})
        finally:
            with self._changed:
                self._num_inside -= 1
                self._changed.notify_all()
        return answer

    def disconnected(self, peer: str) -> None:
        """A sender has died without a bye; called by the actor that learnt of it."""
        self._sink.disconnected(peer)

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.wait_for(lambda: self._num_inside == 0, CLOSE_TIMEOUT_S)
            unanswered, self._unanswered = self._unanswered, set()
        for answer in unanswered:
            answer.set_exception(ReplicaLost(f"receiver {self.address} was closed"))

    def _dispatch(self, message: Message, payload: Payload | None, settle: Callable[[Message], None]) -> str | None:
        kind = message.get("kind")
        if kind == "piece" and payload is not None:
            try:
                header, digest = _from_message(message)
            except (KeyError, TypeError, ValueError) as e:
                return f"piece without a proper header: {e!r}"
            view = payload.view()
            view.flags.writeable = False
            refusal = inbox.accept(self._sink, header, digest, view)
            if refusal is None:
                settle({"ok": True})
            return refusal
        if kind == "call" and isinstance(body := message.get("body"), dict):
            return inbox.handle(self._sink, body, lambda reply: settle({"reply": reply}))
        if kind == "bye":
            self._sink.disconnected(str(message.get("peer")))
            settle({"ok": True})
            return None
        return f"message of kind {kind!r} is not understood; do both ends have one version?"

    def _settle(self, answer: Future[Message], content: Message) -> None:
        with self._changed:
            if answer not in self._unanswered:
                return  # a second reply, or one after the end
            self._unanswered.remove(answer)
        answer.set_result(content)


def _to_message(header: PieceHeader, digest: int) -> Message:
    return {
        "kind": "piece",
        "request_id": header.request_id,
        "epoch": header.epoch,
        "piece": header.piece,
        "nbytes": header.nbytes,
        "detail": list(header.detail),
        "checksum": digest,
    }


def _from_message(message: dict[str, Any]) -> tuple[PieceHeader, int]:
    header = PieceHeader(
        request_id=str(message["request_id"]),
        epoch=int(message["epoch"]),
        piece=int(message["piece"]),
        nbytes=int(message["nbytes"]),
        detail=tuple(int(number) for number in message["detail"]),
    )
    return header, int(message["checksum"])


def _outcome(done: Future[Message]) -> Message | Exception:
    try:
        return done.result()
    except Exception as e:  # CancelledError too
        return e
