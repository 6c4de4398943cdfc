from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_cluster.errors import TransferFailed
from ernie_cluster.transport.slots import MIN_SPAN_BYTES, Slot, Slots

SLOT_BYTES = 3 * MIN_SPAN_BYTES
NUM_SLOTS = 4


class Book:
    """Memory, and what was published of it."""

    def __init__(self) -> None:
        self.memory = np.zeros(NUM_SLOTS * SLOT_BYTES, np.uint8)
        self.published: list[tuple[int, int]] = []
        self.slots = Slots(self.memory, SLOT_BYTES, self.publish)

    def publish(self, first: int, span: int) -> int:
        self.published.append((first, span))
        return len(self.published) - 1

    def read(self, slot: Slot, nbytes: int) -> bytes:
        first, span = self.published[slot.ref]
        return self.memory[first : first + span][:nbytes].tobytes()


def piece(seed: int, nbytes: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


@settings(max_examples=50)
@given(st.lists(st.one_of(st.integers(1, SLOT_BYTES), st.none())))
def test_what_was_put_is_read_until_it_is_given_back_and_publications_are_few(steps: list[int | None]) -> None:
    """A number puts a piece of that size, None gives the oldest back."""
    book = Book()
    held: list[tuple[Slot, bytes]] = []
    for seed, nbytes in enumerate(steps):
        if nbytes is None:
            if held:
                book.slots.give_back(held.pop(0)[0])
        elif len(held) < NUM_SLOTS:
            data = piece(seed, nbytes)
            held.append((book.slots.put(data), data.tobytes()))
        else:
            with pytest.raises(TransferFailed, match="all 4 slots are taken"):
                book.slots.put(piece(seed, nbytes))
        for slot, expected in held:
            assert book.read(slot, len(expected)) == expected
    assert len(set(book.published)) == len(book.published)
    assert {span for _, span in book.published} <= {MIN_SPAN_BYTES, 2 * MIN_SPAN_BYTES, SLOT_BYTES}
    assert all(first % SLOT_BYTES == 0 and first + SLOT_BYTES <= len(book.memory) for first, _ in book.published)


def test_a_publication_that_fails_leaves_the_slot_free() -> None:
    book, chances = Book(), [MemoryError("no more"), None]

    def publish(first: int, span: int) -> int:
        failure = chances.pop(0)
        if failure is not None:
            raise failure
        return 7

    slots = Slots(book.memory[:SLOT_BYTES], SLOT_BYTES, publish)
    with pytest.raises(MemoryError):
        slots.put(piece(0, 10))
    assert slots.put(piece(0, 10)).ref == 7
