"""Bytes of frames between two processes: a length, a kind, a body. Structs and JSON, never pickle.

frame   u32 body length | u8 kind | body
HELLO   JSON {version, token, peer}          sender's first frame
WELCOME JSON {version, staging_bytes}        receiver's answer, with the memory's descriptor
PIECE   u64 id | header (see _PIECE) | request id, UTF-8 | detail, i64 each
CALL    u64 id | JSON
ACK     u64 id                               piece accepted
REPLY   u64 id | JSON                        answer to a call
FAIL    u64 id | text, UTF-8                 piece or call refused

Between GPUs a connection goes over the network, and pieces travel in batches beside it:

CHALLENGE JSON {version, nonce}              receiver's first frame; HELLO and WELCOME then hold proofs, no token
JOIN    JSON {way, ...}                      sender opens a way for bytes, the first or a new one
OFFER   u64 batch                            the pieces announced since the last offer are ready
GRANT   u64 batch                            receiver has begun to receive them
BROKEN  JSON {way, reason}                   the way is of no use any more; from either side
"""

from __future__ import annotations

import enum
import json
import struct
from collections.abc import Iterator

import xxhash

from ernie_cluster.errors import TransferFailed
from ernie_cluster.transport.base import Message, Payload, PieceHeader

VERSION = 2
"""Both ends must speak the same; raise it with every change of the frames."""
MAX_MESSAGE_BYTES = 1 << 20
"""Longest control message as JSON; bulk travels as pieces."""

_HEAD = struct.Struct("<IB")
_ID = struct.Struct("<Q")
_MAX_BODY_BYTES = MAX_MESSAGE_BYTES + _ID.size
_PIECE = struct.Struct("<QQQQqIHH")  # id, offset, checksum, nbytes, epoch, piece, request id bytes, detail numbers


class Kind(enum.IntEnum):
    HELLO = 1
    WELCOME = 2
    PIECE = 3
    CALL = 4
    ACK = 5
    REPLY = 6
    FAIL = 7
    CHALLENGE = 8
    JOIN = 9
    OFFER = 10
    GRANT = 11
    BROKEN = 12


def checksum(payload: Payload) -> int:
    """xxh3 of the payload, 64 bits; finds accidents, not attackers."""
    return int(xxhash.xxh3_64_intdigest(payload.data))


def encode(kind: Kind, body: bytes) -> bytes:
    """One frame; raises TransferFailed when the body is too long."""
    if len(body) > _MAX_BODY_BYTES:
        raise TransferFailed(f"{kind.name} frame of {len(body)} bytes; at most {_MAX_BODY_BYTES}")
    return _HEAD.pack(len(body), kind) + body


def encode_json(message: Message) -> bytes:
    """Raises TransferFailed when the message is not plain JSON, or too long."""
    try:
        data = json.dumps(message, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as e:
        raise TransferFailed(f"message cannot be sent as JSON: {e}; use plain numbers, text, lists and dicts") from e
    if len(data) > MAX_MESSAGE_BYTES:
        raise TransferFailed(f"message of {len(data)} bytes, at most {MAX_MESSAGE_BYTES}; send bulk as pieces")
    return data


def decode_json(data: bytes) -> Message:
    """Raises TransferFailed when the bytes are not a JSON object."""
    try:
        message = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise TransferFailed(f"message of {len(data)} bytes is not JSON: {e}") from e
    if not isinstance(message, dict):
        raise TransferFailed(f"message is a JSON {type(message).__name__}; only objects are understood")
    return message


def with_id(number: int, tail: bytes = b"") -> bytes:
    """Body of CALL, ACK, REPLY and FAIL."""
    return _ID.pack(number) + tail


def split_id(body: bytes) -> tuple[int, bytes]:
    """Number and rest of a CALL, ACK, REPLY or FAIL; raises TransferFailed when it is too short."""
    try:
        return _ID.unpack_from(body)[0], body[_ID.size :]
    except struct.error as e:
        raise TransferFailed(f"frame body of {len(body)} bytes cannot hold an id") from e


def encode_piece(number: int, offset: int, digest: int, header: PieceHeader) -> bytes:
    """Body of a PIECE whose payload lies at `offset` of the staging memory; TransferFailed when a field is too large."""
    name = header.request_id.encode(errors="surrogatepass")
    try:
        fixed = _PIECE.pack(
            number, offset, digest, header.nbytes, header.epoch, header.piece, len(name), len(header.detail)
        )
        return fixed + name + struct.pack(f"<{len(header.detail)}q", *header.detail)
    except struct.error as e:
        raise TransferFailed(f"{header} does not fit a PIECE frame: {e}") from e


def decode_piece(body: bytes) -> tuple[int, int, int, PieceHeader]:
    """Number, offset, checksum and header; TransferFailed when the body is not a PIECE."""
    try:
        number, offset, digest, nbytes, epoch, piece, name_bytes, details = _PIECE.unpack_from(body)
        end = _PIECE.size + name_bytes
        name = body[_PIECE.size : end].decode(errors="surrogatepass")
        detail = struct.unpack(f"<{details}q", body[end:])
    except (struct.error, UnicodeDecodeError) as e:
        raise TransferFailed(f"PIECE frame of {len(body)} bytes cannot be read: {e}") from e
    return number, offset, digest, PieceHeader(name, epoch, piece, nbytes, detail)


class FrameReader:
    """Cuts a byte stream into frames, however it was chopped."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Kind and body of every frame that `data` completes; to be exhausted before the next feed.

        Raises:
            TransferFailed: a frame announces more than the longest body; the stream is useless from here.
        """
        self._rest += data
        start = 0
        while len(self._rest) - start >= _HEAD.size:
            length, kind = _HEAD.unpack_from(self._rest, start)
            if length > _MAX_BODY_BYTES:
                raise TransferFailed(f"frame announces {length} bytes; at most {_MAX_BODY_BYTES}")
            end = start + _HEAD.size + length
            if len(self._rest) < end:
                break
            yield kind, bytes(self._rest[start + _HEAD.size : end])
            start = end
        del self._rest[:start]
