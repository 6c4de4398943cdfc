"""Seam between an engine and whatever moves its bytes to another replica: KV pieces, embeddings, control messages.

A piece is a header and a payload of bytes. This package knows no tensor, no scheduler and no Ray: what a payload
means is the caller's, who supplies the code that packs it and the `Sink` that unpacks it.

Every piece carries a checksum over its payload, computed by the channel after packing and compared by the receiver
before the sink sees a byte. The fate of a failure tells what to do next:

    TransferFailed   this piece or call failed, the channel goes on; the caller gives the hand-over a new epoch
    ReplicaLost      the peer is gone or stands still, the channel is over; the caller picks another replica
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"
Message: TypeAlias = dict[str, JSON]
Payload: TypeAlias = NDArray[np.uint8]
Pack: TypeAlias = Callable[[Payload], None]
Reply: TypeAlias = Callable[[Message], None]
Tamper: TypeAlias = Callable[[Payload], bool]
"""Faults on purpose: a channel that has one asks it between the checksum of a piece and its sending. It may change the
payload, wait, or raise, and then the piece fails; False: the piece is not sent, and nobody is told."""

STALL_TIMEOUT_S = 10.0
"""A peer that owes acknowledgements and gives none for this long is taken for lost."""
HANDSHAKE_TIMEOUT_S = 5.0
"""A connection that has not proved itself by then is dropped."""
CLOSE_TIMEOUT_S = 10.0
"""Longest that `close` waits for a callback of the caller's own (`pack`, `accept`) to come back."""


@dataclass(frozen=True, slots=True)
class PieceHeader:
    """What a payload is, and for which attempt."""

    request_id: str
    epoch: int
    """Number of the attempt; the sink refuses pieces of any epoch but the lease's."""
    piece: int
    """0-based number within the hand-over."""
    nbytes: int
    """Size of the payload, at least 1."""
    detail: tuple[int, ...]
    """The payload in the caller's own terms, e.g. (first_layer, num_layers, first_block, num_blocks)."""


class Sink(Protocol):
    """Receiving engine's side. Called on transport threads, for several senders at once."""

    def accept(self, header: PieceHeader, payload: Payload) -> None:
        """Copy a verified payload to its place before returning.

        Runs on the receiving side, once per piece that arrived whole. `payload` is uint8 [header.nbytes], only to be
        read, and the transport's: it is overwritten after the return. Between GPUs it is a tensor on the device (for
        `torch.as_tensor` the two are alike), and the copy need only be in the current stream at the return. From the return on the lease's owner holds the bytes,
        and the sender may free its own.

        Raises:
            TransferFailed: refused (unknown lease, wrong epoch, duplicate); the sender's future fails with the text.
                Any other exception is a refusal too.
        """
        ...

    def handle(self, message: Message, reply: Reply) -> None:
        """Take a control message (claim, commit, ...).

        Runs on the receiving side, once per call, after all pieces of its `request_id` pushed before it on the same channel
        were accepted or refused. Must not block: `reply` may be called later from any thread, once, never blocks, and does nothing
        when the sender is gone. The message is the sink's to keep. An exception fails the sender's future.
        """
        ...

    def disconnected(self, peer: str) -> None:
        """A sender is gone, by `close`, death or silence; its half-filled leases will not be completed.

        Runs on the receiving side, once per sender, after its last `accept` and `handle`.
        """
        ...


class Channel(Protocol):
    """Sender's end, one per receiver. Owned by who made it, and to be closed by it; safe to use from any thread."""

    @property
    def max_piece_bytes(self) -> int:
        """Largest payload that `push` takes; split larger ones, see `plan.plan_pieces`."""
        ...

    def push(self, header: PieceHeader, pack: Pack) -> Future[None]:
        """Send one piece.

        Runs on the sending side, once per piece, and returns at once. `pack` is called at most once, later, on the
        channel's thread, with a writable uint8 [header.nbytes] that it must fill and not keep: a tensor on the device
        between GPUs, to be filled in the current stream. The future resolves when the receiver has verified and
        accepted the bytes. The caller keeps the source unchanged until then, and frees it. A future that is cancelled
        before its turn is never packed. Pieces may be accepted in any order. Callbacks of the future run on a transport
        thread; keep them short.

        The future fails with:
            TransferFailed: too large, packing failed, checksum wrong, or refused by the sink.
            ReplicaLost: peer gone, or no acknowledgement for the stall timeout; the receiver may or may not have the
                bytes, and only a new epoch makes sure that it does not use them.
        """
        ...

    def call(self, message: Message, timeout_s: float) -> Future[Message]:
        """Send a control message and wait for its reply.

        Runs on the sending side and returns at once. Stays behind all earlier pushes of the request that it names as
        `request_id`, so a commit may follow the last push without waiting for its future; requests take turns. `message` is copied before the return.

        The future fails with:
            TransferFailed: too large, refused, or as PeerSilent: no reply within `timeout_s` (a late one is dropped).
            ReplicaLost: peer gone.
        """
        ...

    def close(self) -> None:
        """End the channel; may be called twice. Outstanding futures fail with ReplicaLost.

        Runs on the sending side, by the channel's owner, never inside `pack`. Afterwards no `pack` is called, thread,
        memory and descriptors are given back, and the receiver's sink has been or will be told `disconnected`.
        """
        ...


class Receiver(Protocol):
    """Receiving end, one per replica and transport; serves any number of senders."""

    address: str
    """Where channels connect to; may hold a secret, so do not log it."""

    def close(self) -> None:
        """Drop all senders and stop listening; may be called twice.

        Runs on the receiving side, by the receiver's owner, not from inside the sink. Afterwards the sink is not
        called any more, and the senders' outstanding futures fail with ReplicaLost.
        """
        ...
