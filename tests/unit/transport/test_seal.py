from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ernie_cluster.transport.seal import damage, frame_bytes, seal


def sealed(data: bytes, number: int = 1, salt: int = 7) -> torch.Tensor:
    frame = torch.full((frame_bytes(len(data)),), 0xA5, dtype=torch.uint8)
    frame[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
    seal(frame, len(data), number, salt)
    return frame


payloads = st.binary(min_size=1, max_size=100)


@given(data=payloads, number=st.integers(0, 2**64 - 1), salt=st.integers(0, 2**60 - 1))
def test_what_was_sealed_is_whole_and_its_payload_untouched(data: bytes, number: int, salt: int) -> None:
    frame = sealed(data, number, salt)
    assert damage(frame, len(data), number, salt).tolist() == [0]
    assert bytes(frame[: len(data)].tolist()) == data


@given(data=payloads, place=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_every_flipped_bit_is_found(data: bytes, place: int, bit: int) -> None:
    frame = sealed(data)
    frame[place % len(frame)] ^= 1 << bit
    assert damage(frame, len(data), 1, 7).tolist() != [0]


@given(words=st.lists(st.binary(min_size=8, max_size=8), min_size=2, max_size=8, unique=True), data=st.data())
def test_words_that_change_places_are_found(words: list[bytes], data: st.DataObject) -> None:
    frame = sealed(b"".join(words))
    other = data.draw(st.permutations(words).filter(lambda order: order != words))
    frame[:-8] = torch.tensor(list(b"".join(other)), dtype=torch.uint8)
    assert damage(frame, 8 * len(words), 1, 7).tolist() != [0]


@pytest.mark.parametrize(("number", "salt", "nbytes"), [(2, 7, 5), (1, 8, 5), (1, 7, 6)])
def test_bytes_of_another_piece_are_found(number: int, salt: int, nbytes: int) -> None:
    assert damage(sealed(b"hello"), nbytes, number, salt).tolist() != [0]


def test_memory_that_was_never_written_does_not_pass() -> None:
    for value in (0, 0xA5, 0xFF):
        frame = torch.full((frame_bytes(64),), value, dtype=torch.uint8)
        assert damage(frame, 64, 1, 7).tolist() != [0]


def test_frame_bytes_by_example() -> None:
    assert [frame_bytes(n) for n in (1, 8, 9)] == [16, 16, 24]
