from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_cluster.errors import TransferFailed
from ernie_cluster.transport import wire
from ernie_cluster.transport.base import PieceHeader
from ernie_cluster.transport.wire import FrameReader, Kind

U64 = st.integers(0, 2**64 - 1)
I64 = st.integers(-(2**63), 2**63 - 1)
HEADERS = st.builds(
    PieceHeader,
    request_id=st.text(max_size=50),
    epoch=I64,
    piece=st.integers(0, 2**32 - 1),
    nbytes=U64,
    detail=st.lists(I64, max_size=8).map(tuple),
)


@given(number=U64, offset=U64, digest=U64, header=HEADERS)
def test_a_piece_survives_the_wire(number: int, offset: int, digest: int, header: PieceHeader) -> None:
    assert wire.decode_piece(wire.encode_piece(number, offset, digest, header)) == (number, offset, digest, header)


@pytest.mark.parametrize(
    "header",
    [
        PieceHeader("r", 2**63, 0, 1, ()),
        PieceHeader("r", 0, -1, 1, ()),
        PieceHeader("r", 0, 0, 1, (2**63,)),
        PieceHeader("r" * 70_000, 0, 0, 1, ()),
        PieceHeader("r", 0, 0, 1, (0,) * 70_000),
    ],
)
def test_a_header_that_does_not_fit_is_named(header: PieceHeader) -> None:
    with pytest.raises(TransferFailed, match="does not fit"):
        wire.encode_piece(1, 0, 0, header)


@given(data=st.binary(max_size=120))
def test_arbitrary_bytes_are_a_piece_or_a_transfer_failed(data: bytes) -> None:
    try:
        number, offset, digest, header = wire.decode_piece(data)
    except TransferFailed:
        return
    assert wire.encode_piece(number, offset, digest, header) == data


@given(
    frames=st.lists(st.tuples(st.sampled_from(list(Kind)), st.binary(max_size=300)), max_size=20),
    seed=st.integers(0, 2**32),
)
def test_frames_survive_any_chopping(frames: list[tuple[Kind, bytes]], seed: int) -> None:
    stream = b"".join(wire.encode(kind, body) for kind, body in frames)
    reader, chance = FrameReader(), random.Random(seed)
    got: list[tuple[int, bytes]] = []
    while stream:
        cut = chance.randint(1, min(len(stream), 200))
        got += reader.feed(stream[:cut])
        stream = stream[cut:]
    assert got == frames


def test_a_frame_that_is_too_long_is_refused_before_it_has_come() -> None:
    with pytest.raises(TransferFailed, match="announces 4294967295 bytes"):
        list(FrameReader().feed(b"\xff\xff\xff\xff\x01"))
    with pytest.raises(TransferFailed, match="at most"):
        wire.encode(Kind.CALL, bytes(wire.MAX_MESSAGE_BYTES + 9))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(message=st.dictionaries(st.text(), JSON_VALUES, max_size=5))
def test_a_message_survives_the_wire(message: dict[str, object]) -> None:
    assert wire.decode_json(wire.encode_json(message)) == message  # type: ignore[arg-type]


@pytest.mark.parametrize("data", [b"", b"[]", b"3", b"{", b"\xff", b"[" * 100_000, b'{"a":' * 100_000])
def test_what_is_no_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(TransferFailed):
        wire.decode_json(data)


@given(data=st.binary(min_size=1, max_size=2000), place=st.integers(0), bit=st.integers(0, 7))
def test_one_flipped_bit_changes_the_checksum(data: bytes, place: int, bit: int) -> None:
    payload = np.frombuffer(data, np.uint8)
    damaged = payload.copy()
    damaged[place % len(data)] ^= 1 << bit
    assert wire.checksum(payload) == wire.checksum(payload.copy()) != wire.checksum(damaged)


def test_a_frame_too_short_for_its_id_is_refused() -> None:
    assert wire.split_id(wire.with_id(7, b"tail")) == (7, b"tail")
    with pytest.raises(TransferFailed, match="3 bytes"):
        wire.split_id(b"abc")
