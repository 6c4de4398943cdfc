"""NIXL, through Ray Direct Transport: receivers read pieces out of their sender's memory. Imported where it is wished for.

The books are the object store's (`ObjectStoreChannel` and its receiver); what differs is that a piece lies in a slot
of registered host memory, and that the receiver reads it from there into registered memory of its own, without a copy
through the object store or a connection of ours.

Ray keeps at the receiver, for as long as its process lives, a note of every object that was fetched this way (its issue
57962). Slots make that few: the same objects are fetched again and again. They are never freed, neither, which would
take actors with `enable_tensor_transport`: the memory of a channel that is closed goes to the next one.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import ray
import torch

from ernie_cluster.config.transport import TransportConfig
from ernie_cluster.errors import ConfigError, TransferFailed
from ernie_cluster.transport.base import Message, Payload
from ernie_cluster.transport.object_store import Deliver, ObjectStoreChannel, ObjectStoreReceiver
from ernie_cluster.transport.slots import Slot, Slots

FETCH_TIMEOUT_S = 5.0
"""From a piece's arrival at the receiver: half of what its sender takes for lost, so that one dead sender, whose pieces
all wait for this, keeps no living one waiting for longer."""


class DirectTransport:
    """All that is used of Ray's interface, which Ray calls alpha. NIXL's agent takes one thread at a time.

    Raises:
        ImportError: not for torch's CUDA, say; Ray would keep the reason for itself.
    """

    def __init__(self) -> None:
        import nixl  # noqa: F401

    def register(self, memory: torch.Tensor) -> None:
        """Let the network know host memory, uint8 [n], for as long as the process lives."""
        ray.experimental.register_nixl_memory(memory)

    def publish(self, memory: torch.Tensor) -> Any:
        """A reference by which other processes read registered memory; not a copy of it."""
        return ray.put([memory], _tensor_transport="nixl")

    def read(self, ref: Any, target: torch.Tensor, timeout_s: float) -> torch.Tensor:
        """What is there now, read into registered memory of the same size; published memory itself in its own process.

        Raises:
            TimeoutError: bytes may still come.
            RayError: the owner is dead, or the network failed.
        """
        ray.experimental.set_target_for_ref(ref, [target])
        tensors: list[torch.Tensor] = ray.get(ref, timeout=timeout_s)
        return tensors[0]


class NixlChannel(ObjectStoreChannel):
    """Sender's end, see `base.Channel`.

    Args:
        slots: of this channel alone.
        deliver: as of `ObjectStoreChannel`.
        peer: as there.
        slot_bytes: the largest piece.
        give_back: takes the slots when the channel is closed; some of them may still wait for their answer.
    """

    def __init__(
        self, slots: Slots, deliver: Deliver, peer: str, slot_bytes: int, give_back: Callable[[Slots], None]
    ) -> None:
        self._slots = slots
        self._closed = threading.Lock()
        self._give_back = give_back
        super().__init__(
            slots.put,
            lambda message, refs: _deliver(slots, deliver, message, refs),
            peer,
            max_piece_bytes=slot_bytes,
            max_in_flight_bytes=slots.num_slots * slot_bytes,
            max_in_flight_pieces=slots.num_slots,
        )

    def close(self) -> None:
        super().close()
        if self._closed.acquire(blocking=False):  # once
            self._give_back(self._slots)


class NixlWay:
    """Owns the registered memory of one process: a buffer to read into, and slots for each channel.

    Args:
        config: `piece_bytes` is the size of a slot, `staging_bytes` what a channel has of them.
        direct: Ray's interface, or its twin in tests.

    Raises:
        ConfigError: nixl does not work here.
    """

    def __init__(self, config: TransportConfig, direct: DirectTransport | None = None) -> None:
        self._slot_bytes = config.piece_bytes
        self._num_slots = config.staging_bytes // config.piece_bytes
        self._one_thread = threading.RLock()
        self._abandoned: list[torch.Tensor] = []
        self._idle: list[Slots] = []
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="nixl-reader")
        try:
            self._direct = direct or DirectTransport()
            self._buffer = self._register(self._slot_bytes)
        except Exception as e:
            raise ConfigError(f"transport.kind = nixl does not work here: {e}; set transport.kind to auto") from e

    def open(self, deliver: Deliver, peer: str) -> NixlChannel:
        """A channel whose pieces lie in this process's memory.

        Raises:
            TransferFailed: there is no memory for it.
        """
        try:
            slots = self._idle.pop() if self._idle else self._make_slots()
        except Exception as e:
            raise TransferFailed(f"no registered memory for another channel: {e}") from e
        return NixlChannel(slots, deliver, peer, self._slot_bytes, self._idle.append)

    async def receive(self, receiver: ObjectStoreReceiver, message: Message, ref: Any) -> Message:
        """Read a piece where its sender has it, and hand it to the receiver; the answer for the sender.

        One after another: they share the buffer.
        """
        deadline = time.monotonic() + FETCH_TIMEOUT_S
        return await asyncio.get_running_loop().run_in_executor(
            self._reader, self._receive, receiver, message, ref, deadline
        )

    def close(self) -> None:
        """What is being read may be finished; the memory stays registered as long as the process lives."""
        self._reader.shutdown(wait=False, cancel_futures=True)

    def _receive(self, receiver: ObjectStoreReceiver, message: Message, ref: Any, deadline: float) -> Message:
        try:
            nbytes, span = int(message["nbytes"]), int(message["span"])  # type: ignore[arg-type]
            piece = self._read(ref, span, deadline - time.monotonic())[:nbytes]
        except Exception as e:
            return {"refused": f"a piece could not be read by NIXL: {e!r}"[:2000]}
        return receiver.receive(message, piece).result()  # resolved: a piece waits for nobody

    def _read(self, ref: Any, span: int, timeout_s: float) -> Payload:
        if timeout_s <= 0:
            raise TimeoutError(f"its turn did not come within {FETCH_TIMEOUT_S} s")
        with self._one_thread:
            try:
                found: Payload = self._direct.read(ref, self._buffer[:span], timeout_s).numpy()
            except TimeoutError:  # bytes may still come
                self._abandoned.append(self._buffer)
                self._buffer = self._register(self._slot_bytes)
                raise
        return found

    def _make_slots(self) -> Slots:
        memory = self._register(self._num_slots * self._slot_bytes)

        def publish(first: int, span: int) -> Any:
            with self._one_thread:
                return self._direct.publish(memory[first : first + span])

        return Slots(memory.numpy(), self._slot_bytes, publish)

    def _register(self, nbytes: int) -> torch.Tensor:
        memory = torch.zeros(nbytes, dtype=torch.uint8)
        with self._one_thread:
            self._direct.register(memory)
        return memory


def _deliver(slots: Slots, deliver: Deliver, message: Message, refs: list[Any]) -> Future[Message]:
    """`deliver`, with a piece's slot in place of the object; the slot is free when the answer is there."""
    if not refs:
        return deliver(message, [])
    slot: Slot = refs[0]
    try:
        delivery = deliver({**message, "span": slot.span_bytes}, [slot.ref])
    except BaseException:
        slots.give_back(slot)
        raise
    delivery.add_done_callback(lambda _: slots.give_back(slot))
    return delivery
