"""A bit that flips between a sender's checksum and the receiver's read: found on every transport, and tried again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import Any

import pytest

from ernie_cluster.engine.worker import Worker
from ernie_cluster.errors import ReplicaError, TransferFailed
from ernie_cluster.transport.base import Channel, Payload
from ernie_cluster.transport.gpu_channel import GpuChannel
from ernie_cluster.transport.local import Faults, LocalChannel, LocalReceiver
from ernie_cluster.transport.object_store import ObjectStoreChannel, ObjectStoreReceiver
from ernie_cluster.transport.shared_memory import SharedMemoryChannel, SharedMemoryReceiver
from tests.tiny import make_request, make_worker
from tests.unit.engine.test_handover import TIMEOUT_S, Path
from tests.unit.engine.test_handover_gpu import GpuPath
from tests.unit.engine.test_laws import answers
from tests.unit.transport.nccl_twin import Mishaps

SPOILT = 2
"""Which piece, counted from 0."""


def local(stack: ExitStack, decode: Worker) -> Channel:
    faults = Faults()
    faults.corrupt(SPOILT)
    return stack.enter_context(closing(LocalChannel(LocalReceiver(decode.inbox), "prefill", faults)))


def object_store(stack: ExitStack, decode: Worker) -> Channel:
    receiver = ObjectStoreReceiver(decode.inbox, "decode")
    num_put = 0

    def put(payload: Payload) -> Payload:
        nonlocal num_put
        stored = payload.copy()
        stored[7] ^= num_put == SPOILT
        num_put += 1
        return stored

    return stack.enter_context(
        closing(ObjectStoreChannel(put, lambda message, refs: receiver.receive(message, *refs), "prefill"))
    )


def shared_memory(stack: ExitStack, decode: Worker) -> Channel:
    receiver = stack.enter_context(closing(SharedMemoryReceiver(decode.inbox, 1 << 20)))
    channel = stack.enter_context(closing(SharedMemoryChannel(receiver.address, "prefill")))
    send, num_sent = channel._link.send, 0

    def spoil(frame: bytes, *args: Any) -> None:
        nonlocal num_sent
        if channel._places and num_sent == SPOILT:
            offset, _ = list(channel._places.values())[-1]
            channel._staging.bytes[offset + 7] ^= 1
        num_sent += bool(channel._places)
        send(frame, *args)

    channel._link.send = spoil  # type: ignore[method-assign]
    return channel


def gpu(transport: str) -> Callable[[ExitStack], Path]:
    def path(stack: ExitStack) -> Path:
        found = GpuPath(stack, transport, Mishaps({"send": {SPOILT: "flip"}}))
        if transport == "ipc":
            spoil_ipc(found.kv)
        return found

    return path


def spoil_ipc(channel: GpuChannel) -> None:
    carry, num_carried = channel._carrier.carry, 0

    def spoil(link: Any, batch: Any) -> Any:
        nonlocal num_carried
        if num_carried == 0:  # a quick sender puts everything into one batch
            channel._carrier.staging[100] ^= 1  # type: ignore[attr-defined]
        num_carried += 1
        return carry(link, batch)

    channel._carrier.carry = spoil  # type: ignore[method-assign]


def host(way: Callable[[ExitStack, Worker], Channel]) -> Callable[[ExitStack], Path]:
    def path(stack: ExitStack) -> Path:
        found = Path(prefill={"piece_bytes": 2048, "max_batch_tokens": 16})
        found.kv = way(stack, found.decode)  # type: ignore[assignment]
        return found

    return path


PATHS = {
    "local": host(local),
    "object store": host(object_store),
    "shared memory": host(shared_memory),
    "nccl": gpu("nccl"),
    "ipc": gpu("ipc"),
}


@pytest.mark.parametrize("way", PATHS)
def test_a_spoilt_piece_fails_the_attempt_and_the_next_one_is_right(way: str) -> None:
    request = make_request(range(200, 240), "spoilt", max_tokens=6)
    expected = answers(*make_worker(), [request])["spoilt"]
    with ExitStack() as stack, PATHS[way](stack) as path:
        path.open(request)
        error = path.failure("spoilt")
        assert isinstance(error, TransferFailed)
        assert isinstance(error, ReplicaError), "what the API side tries again"
        path.prefilled.drain()
        assert path.prefilled.tokens.pop("spoilt", []) == expected[:1]
        assert "spoilt" not in path.decoded.tokens, "nothing was decoded from it"
        path.decoded.tokens["spoilt"] = [-1]
        path.open(request, epoch=1)
        path.decoded.wait_for(["spoilt"], TIMEOUT_S)
        path.prefilled.drain()
        assert path.prefilled.tokens["spoilt"] + path.decoded.tokens["spoilt"][1:] == expected
