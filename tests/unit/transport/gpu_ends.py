"""Both ends of the transports between GPUs, on twins in one process."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

from ernie_cluster.errors import TransferFailed
from ernie_cluster.transport.base import Payload, Sink
from ernie_cluster.transport.gpu_channel import GpuChannel
from ernie_cluster.transport.gpu_receiver import GpuReceiver
from ernie_cluster.transport.gpu_side import Deadlines, GpuSide
from ernie_cluster.transport.ipc import IpcFetcher, Regions, open_ipc
from ernie_cluster.transport.nccl import NcclFetcher, open_nccl
from tests.unit.transport.conformance import TIMEOUT_S, RecordingSink, header, send
from tests.unit.transport.gpu_twin import TwinGpu
from tests.unit.transport.nccl_twin import Mishaps

STAGING_BYTES = 1 << 20
PATIENT = Deadlines(TIMEOUT_S, TIMEOUT_S, TIMEOUT_S, TIMEOUT_S)

Plan = dict[str, dict[int, str]]


@dataclass
class Ends:
    """Two processes' sides, as if on two GPUs of one machine."""

    stack: ExitStack
    transport: str = "nccl"
    deadlines: Deadlines = PATIENT
    sender_plan: Plan = field(default_factory=dict)
    receiver_plan: Plan = field(default_factory=dict)
    sink: RecordingSink = field(default_factory=RecordingSink)

    def __post_init__(self) -> None:
        self.gave_up: list[str] = []
        self.mine = GpuSide(TwinGpu("gpu-0", Mishaps(self.sender_plan)), self.gave_up.append, self.deadlines)
        self.theirs = GpuSide(TwinGpu("gpu-1", Mishaps(self.receiver_plan)), self.gave_up.append, self.deadlines)
        self.receiver = self.stack.enter_context(closing(new_receiver(self.sink, self.theirs)))

    def connect(self, address: str | None = None) -> GpuChannel:
        make = open_nccl if self.transport == "nccl" else open_ipc
        return self.stack.enter_context(closing(make(address or self.receiver.address, "prefill-0", self.mine)))


def new_receiver(sink: Sink, side: GpuSide) -> GpuReceiver:
    """A receiver that offers both transports."""
    regions = Regions()
    fetchers = {"nccl": NcclFetcher, "ipc": lambda side, nbytes: IpcFetcher(side, nbytes, regions)}
    return GpuReceiver(sink, side, "127.0.0.1", fetchers, STAGING_BYTES)


def push(channel: GpuChannel, piece: int, nbytes: int = 5000) -> Future[None]:
    return send(channel, header(piece, nbytes), bytes([piece]) * nbytes)


def push_until_it_works(channel: GpuChannel, piece: int) -> None:
    """A busy machine may miss a short deadline; the way is then opened anew, and this goes on."""
    for _ in range(50):
        try:
            push(channel, piece).result(TIMEOUT_S)
        except TransferFailed:
            continue
        return
    raise AssertionError("no way was opened again")


def push_group(channel: GpuChannel, count: int) -> list[Future[None]]:
    """Pieces 0 to count - 1 that travel as one group: the first is not packed before the others are queued."""
    gate = threading.Event()

    def pack(out: Payload) -> None:
        assert gate.wait(TIMEOUT_S)
        out[:] = 0

    pushes = [channel.push(header(0, 5000), pack), *(push(channel, piece) for piece in range(1, count))]
    gate.set()
    return pushes
