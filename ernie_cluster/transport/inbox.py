"""What every receiver does with a piece or a call, whichever way it came."""

from __future__ import annotations

import logging

from ernie_cluster.errors import TransferFailed
from ernie_cluster.transport.base import Message, Payload, PieceHeader, Reply, Sink
from ernie_cluster.transport.wire import checksum

_MAX_REASON_CHARS = 2000

_log = logging.getLogger(__name__)


def accept(sink: Sink, header: PieceHeader, digest: int, payload: Payload) -> str | None:
    """Verify a payload and give it to the sink.

    Args:
        digest: checksum that the sender announced.
        payload: uint8 [n], read-only.

    Returns:
        None when the sink has accepted it, else the reason of the refusal, for the sender.
    """
    found = checksum(payload)
    if len(payload) != header.nbytes or found != digest:
        return damaged(
            header, f"{len(payload)} of {header.nbytes} bytes, checksum {found:016x} instead of {digest:016x}"
        )
    return give(sink, header, payload)


def damaged(header: PieceHeader, how: str) -> str:
    """Why a piece is refused that is not what was sent."""
    return (
        f"piece {header.piece} of request {header.request_id} was damaged on the way: {how}; "
        "hand over again under a new epoch"
    )


def give(sink: Sink, header: PieceHeader, payload: Payload) -> str | None:
    """Give a verified payload to the sink; the reason of its refusal, or None."""
    try:
        sink.accept(header, payload)
    except Exception as e:
        return _refusal(e)
    return None


def handle(sink: Sink, message: Message, reply: Reply) -> str | None:
    """Give a control message to the sink; the reason of the refusal, or None when the sink will reply."""
    try:
        sink.handle(message, reply)
    except Exception as e:
        return _refusal(e)
    return None


def _refusal(error: Exception) -> str:
    if isinstance(error, TransferFailed):
        return str(error)[:_MAX_REASON_CHARS]
    _log.error("unexpected error in the sink", exc_info=error)
    return f"{type(error).__name__} in the receiver: {error}"[:_MAX_REASON_CHARS]
