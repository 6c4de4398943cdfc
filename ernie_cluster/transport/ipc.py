"""KV and embeddings between two GPUs of one host by CUDA IPC: the sender writes into the receiver's staging memory.

The receiver allocates that memory and tells its handle; a piece is offered when its bytes are there. Nothing waits for
a peer on the device, so nothing spins when one dies, and both may share one GPU.

Freeing memory that another process has open is undefined, and a killed sender does not say when it let go. So staging
memory is never freed: that of senders that are gone is kept for the next ones. A late write of a dead sender's kernel breaks the seal, whose
salt is another one for each connection.
"""

from __future__ import annotations

import threading
import time

import torch

from ernie_cluster.errors import TransferFailed
from ernie_cluster.transport import wire
from ernie_cluster.transport.base import Message
from ernie_cluster.transport.gpu import Region
from ernie_cluster.transport.gpu_channel import Batch, GpuChannel
from ernie_cluster.transport.gpu_side import GpuSide, Steps, run_through, until, until_still
from ernie_cluster.transport.handshake import connect
from ernie_cluster.transport.link import Link
from ernie_cluster.transport.wire import Kind


def open_ipc(address: str, peer: str, side: GpuSide) -> GpuChannel:
    """A channel to a `GpuReceiver` of this host that offers `ipc`; raises as `GpuChannel` does."""
    greeting = connect(address, peer, "ipc")
    try:
        carrier = IpcCarrier(side, greeting.welcome)
    except BaseException:
        greeting.sock.close()
        raise
    return GpuChannel(greeting, side, carrier, f"ipc-to-{address.split(':')[1]}")


class IpcCarrier:
    """A `gpu_channel.Carrier`.

    Raises:
        TransferFailed: the receiver's memory cannot be seen from this process.
    """

    def __init__(self, side: GpuSide, welcome: Message) -> None:
        self._side = side
        side.gpu.bind()
        try:
            handle, nbytes = bytes.fromhex(str(welcome["handle"])), int(str(welcome["staging_bytes"]))
            self._there = side.gpu.open(handle, nbytes)
        except Exception as e:
            raise TransferFailed(f"the receiver's GPU memory cannot be opened by CUDA IPC: {e}") from e
        self.staging = side.gpu.allocate(nbytes)
        self._stream = side.gpu.new_stream()
        self._is_open = False

    def open(self, link: Link, way: int) -> Steps:
        self._is_open, deadline_s = False, time.monotonic() + self._side.deadlines.join_s
        link.send(wire.encode(Kind.JOIN, wire.encode_json({"way": way})))
        while not self._is_open:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TransferFailed(f"the receiver did not open its memory within {self._side.deadlines.join_s} s")
            yield left_s

    def carry(self, link: Link, batch: Batch) -> Steps:
        gpu = self._side.gpu
        for offset, nbytes in batch.frames:
            gpu.copy(self._there + offset, self.staging[offset : offset + nbytes], self._stream)
        yield from until(gpu.mark(self._stream), self._side.deadlines.transfer_s, "writing to the receiver's GPU")
        link.send(batch.announcement)

    def granted(self, number: int) -> None:
        self._is_open = True

    def abandon(self) -> Steps:
        yield from until_still(self._side, self._stream, "writing to the receiver's GPU")

    def close(self) -> None:
        run_through(self.abandon())
        self._side.gpu.close(self._there)


class Regions:
    """Shared staging memory of one process, used again and again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[Region] = []

    def take(self, side: GpuSide, nbytes: int) -> Region:
        """A region of `nbytes`, always the same number."""
        with self._lock:
            return self._idle.pop() if self._idle else side.gpu.share(nbytes)

    def give_back(self, region: Region) -> None:
        with self._lock:
            self._idle.append(region)


class IpcFetcher:
    """A `gpu_receiver.Fetcher`."""

    def __init__(self, side: GpuSide, staging_bytes: int, regions: Regions) -> None:
        self._regions = regions
        self._region = regions.take(side, staging_bytes)
        self.staging = self._region.data

    @property
    def welcome(self) -> Message:
        return {"handle": self._region.handle.hex()}

    def open(self, link: Link, join: Message) -> Steps:
        link.send(wire.encode(Kind.GRANT, wire.with_id(0)))  # nothing reads what an older way brought
        yield from ()

    def fetch(self, link: Link, number: int, frames: list[torch.Tensor]) -> Steps:
        yield from ()  # an offer says that the bytes are here

    def abandon(self) -> Steps:
        yield from ()

    def close(self) -> None:
        self._regions.give_back(self._region)
