"""Memory of a sender that receivers read from afar: equal slots, of which each is published once and used for ever.

To publish memory is dear (it is registered with a network, and whoever reads it keeps a note of it), to read it is
cheap. So pieces come and go, and what is published stays. Knows no network: how to publish is an argument.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ernie_cluster.errors import TransferFailed
from ernie_cluster.transport.base import Payload

MIN_SPAN_BYTES = 4096
"""Less is not worth a publication of its own."""

Publish = Callable[[int, int], Any]


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """A piece in its place."""

    first_byte: int
    span_bytes: int
    """What a receiver reads: the piece, and rest of older ones up to the next power of two."""
    ref: Any
    """By which a receiver reads it."""


class Slots:
    """Owns who is where. Safe to use from any thread.

    Args:
        memory: uint8 [n * slot_bytes], writable; stays where it is as long as anybody reads.
        slot_bytes: the largest piece, at least 1.
        publish: makes `span_bytes` from `first_byte` on readable and returns a reference. Called once for each pair: a
            slot has one for each power of two that a piece in it was rounded up to.
    """

    def __init__(self, memory: Payload, slot_bytes: int, publish: Publish) -> None:
        self.num_slots = len(memory) // slot_bytes
        self._memory = memory
        self._slot_bytes = slot_bytes
        self._publish = publish
        self._published: dict[tuple[int, int], Any] = {}
        self._free = [number * slot_bytes for number in range(self.num_slots)]
        self._lock = threading.Lock()

    def put(self, payload: Payload) -> Slot:
        """Copy a piece to a free slot, which it keeps until `give_back`.

        Raises:
            TransferFailed: no slot is free. Whatever `publish` raises; the slot is free then.
        """
        span = min(max(MIN_SPAN_BYTES, 1 << (len(payload) - 1).bit_length()), self._slot_bytes)
        with self._lock:
            if not self._free:
                raise TransferFailed(f"all {self.num_slots} slots are taken; raise transport.staging_bytes")
            first = self._free.pop()  # the last one given back, whose publications are likely there
        try:
            self._memory[first : first + len(payload)] = payload
            ref = self._published.get((first, span))
            if ref is None:
                ref = self._published[first, span] = self._publish(first, span)
        except BaseException:
            self._free_again(first)
            raise
        return Slot(first, span, ref)

    def give_back(self, slot: Slot) -> None:
        """Nobody waits for this piece any more. A reader that is late finds another one's bytes, and its checksum wrong."""
        self._free_again(slot.first_byte)

    def _free_again(self, first: int) -> None:
        with self._lock:
            self._free.append(first)
