"""Transport inside one process, for tests and for a mixed replica: the same promises, and mishaps on demand.

Headers go through JSON, payloads are copied and checked as between two processes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

import numpy as np

from ernie_cluster.errors import ReplicaLost, TransferFailed
from ernie_cluster.transport import wire
from ernie_cluster.transport.base import STALL_TIMEOUT_S, Message, Payload, Sink
from ernie_cluster.transport.object_store import MAX_IN_FLIGHT_BYTES, ObjectStoreChannel, ObjectStoreReceiver

_Receive = Callable[[Payload], "Future[Message]"]
_addresses = itertools.count()


class LocalReceiver(ObjectStoreReceiver):
    """Receiving end; the sink is called on the channels' threads."""

    def __init__(self, sink: Sink) -> None:
        super().__init__(sink, address=f"local:{next(_addresses)}")


class Faults:
    """Mishaps that befall the pieces of one channel, by their place in the order of sending, from 0."""

    def __init__(self) -> None:
        self._mishaps: dict[int, Callable[[Payload, _Receive], Future[Message]]] = {}
        self._num_sent = 0

    def drop(self, piece: int) -> None:
        """It never arrives; the channel finds out by its stall timeout."""
        self._mishaps[piece] = lambda payload, receive: Future()

    def corrupt(self, piece: int) -> None:
        """One bit flips on the way."""

        def flip(payload: Payload, receive: _Receive) -> Future[Message]:
            payload[len(payload) // 2] ^= 1
            return receive(payload)

        self._mishaps[piece] = flip

    def fail(self, piece: int) -> None:
        """It fails, the channel goes on."""
        self._mishaps[piece] = lambda payload, receive: _failed(TransferFailed(f"injected fault at piece {piece}"))

    def lose(self, piece: int) -> None:
        """The peer is lost before it arrives."""
        self._mishaps[piece] = lambda payload, receive: _failed(ReplicaLost(f"injected loss at piece {piece}"))

    def hold(self, piece: int) -> Callable[[], None]:
        """It is held up until the returned function is called, once; later pieces pass it.

        It arrives then on the calling thread, even when the channel was closed meanwhile: a late write.
        """
        held: list[Callable[[], Future[Message]]] = []
        delivery: Future[Message] = Future()

        def keep(payload: Payload, receive: _Receive) -> Future[Message]:
            held.append(partial(receive, payload))
            return delivery

        def release() -> None:
            assert held, f"piece {piece} was not sent yet"
            held.pop()().add_done_callback(partial(_copy_outcome, delivery))

        self._mishaps[piece] = keep
        return release

    def deliver(self, payload: Payload, receive: _Receive) -> Future[Message]:
        """Send the next piece through its mishap, if it has one. Called by the channel."""
        mishap = self._mishaps.pop(self._num_sent, None)
        self._num_sent += 1
        return mishap(payload, receive) if mishap else receive(payload)


class LocalChannel(ObjectStoreChannel):
    """Sender's end, with a thread of its own; see `base.Channel`.

    Args:
        receiver: of the same process.
        peer: what the receiver's sink knows this sender by.
        faults: mishaps for this channel.
        max_in_flight_bytes, stall_timeout_s: see `ObjectStoreChannel`.
    """

    def __init__(
        self,
        receiver: LocalReceiver,
        peer: str = "local",
        faults: Faults | None = None,
        *,
        max_in_flight_bytes: int = MAX_IN_FLIGHT_BYTES,
        stall_timeout_s: float = STALL_TIMEOUT_S,
    ) -> None:
        faults = faults or Faults()

        def deliver(message: Message, refs: list[Payload]) -> Future[Message]:
            message = wire.decode_json(wire.encode_json(message))
            if not refs:
                return receiver.receive(message)
            return faults.deliver(refs[0], partial(receiver.receive, message))

        super().__init__(
            np.copy, deliver, peer, max_in_flight_bytes=max_in_flight_bytes, stall_timeout_s=stall_timeout_s
        )


def _failed(error: Exception) -> Future[Message]:
    delivery: Future[Message] = Future()
    delivery.set_exception(error)
    return delivery


def _copy_outcome(target: Future[Message], done: Future[Message]) -> None:
    error = done.exception()
    if error is None:
        target.set_result(done.result())
    else:
        target.set_exception(error)
