"""KV and embeddings from GPU to GPU by NCCL: one communicator of two ranks for each channel.

The control connection carries everything but payloads: the unique id, what is about to come, and acknowledgements. It
also tells at once that the peer's process is gone, which NCCL on one host never does.

A sender begins to send when the receiver has begun to receive (GRANT), and a GPU receives from one sender at a time (see
`gpu_side.Turns`). So each kernel that waits for its peer waits for one that is about to run, whatever else the two do.
"""

from __future__ import annotations

import torch

from ernie_cluster.errors import TransferFailed
from ernie_cluster.transport import wire
from ernie_cluster.transport.base import Message
from ernie_cluster.transport.gpu_channel import Batch, GpuChannel
from ernie_cluster.transport.gpu_side import GpuSide, Steps, run_through
from ernie_cluster.transport.handshake import connect
from ernie_cluster.transport.link import Link
from ernie_cluster.transport.nccl_pair import Pair, UniqueId, uid_from_json, uid_to_json
from ernie_cluster.transport.wire import Kind

_HELLO_BYTES = 8
"""The first exchange of a pair, which sets the links up."""


def open_nccl(address: str, peer: str, side: GpuSide) -> GpuChannel:
    """A channel to a `GpuReceiver` that offers `nccl`; raises as `GpuChannel` does."""
    greeting = connect(address, peer, "nccl")
    side.gpu.bind()
    carrier = NcclCarrier(side, int(str(greeting.welcome["staging_bytes"])))
    return GpuChannel(greeting, side, carrier, f"nccl-to-{address.split(':')[1]}")


class _OnePair:
    """The pair of the open way, if there is one."""

    def __init__(self, side: GpuSide, staging_bytes: int) -> None:
        self._side = side
        self.staging = side.gpu.allocate(staging_bytes)
        self._hello = side.gpu.allocate(_HELLO_BYTES)
        self._pair: Pair | None = None

    def abandon(self) -> Steps:
        if self._pair is not None:
            self._pair.end()
            yield from self._pair.gone()
            self._pair = None

    def close(self) -> None:
        if self._pair is not None:
            self._pair.end()
            run_through(self._pair.gone())  # the staging memory goes with this object

    def _join(self, uid: UniqueId, rank: int) -> Steps:
        assert self._pair is None
        self._pair = Pair(self._side, uid, rank)
        first = self._pair.start([self._hello])
        yield from self._pair.finish(first, self._side.deadlines.join_s, "setting up a communicator")

    def _open_pair(self) -> Pair:
        assert self._pair is not None
        return self._pair


class NcclCarrier(_OnePair):
    """A `gpu_channel.Carrier`: rank 0."""

    def __init__(self, side: GpuSide, staging_bytes: int) -> None:
        super().__init__(side, staging_bytes)
        self._granted: set[int] = set()

    def open(self, link: Link, way: int) -> Steps:
        self._granted.clear()
        try:
            uid = self._side.gpu.nccl.get_unique_id()
        except Exception as e:
            raise TransferFailed(f"NCCL gives no unique id: {e}") from e
        join: Message = {"way": way, "uid": uid_to_json(uid)}  # type: ignore[dict-item]
        link.send(wire.encode(Kind.JOIN, wire.encode_json(join)))
        yield from self._join(uid, 0)

    def granted(self, number: int) -> None:
        self._granted.add(number)

    def carry(self, link: Link, batch: Batch) -> Steps:
        link.send(batch.announcement)
        while batch.number not in self._granted:
            yield None  # the stall timeout of the pieces bounds this
        self._granted.discard(batch.number)
        parts = [self.staging[offset : offset + nbytes] for offset, nbytes in batch.frames]
        pair = self._open_pair()
        exchange = pair.start(parts)
        yield from pair.finish(exchange, self._side.deadlines.transfer_s, f"sending {len(parts)} pieces")


class NcclFetcher(_OnePair):
    """A `gpu_receiver.Fetcher`: rank 1."""

    @property
    def welcome(self) -> Message:
        return {}

    def open(self, link: Link, join: Message) -> Steps:
        yield from self._join(uid_from_json(join.get("uid")), 1)

    def fetch(self, link: Link, number: int, frames: list[torch.Tensor]) -> Steps:
        turns = self._side.turns
        try:
            while not turns.ask(self, link.wake):
                yield None
            pair = self._open_pair()
            exchange = pair.start(frames)
            link.send(wire.encode(Kind.GRANT, wire.with_id(number)))
            yield from pair.finish(exchange, self._side.deadlines.transfer_s, f"receiving {len(frames)} pieces")
        finally:
            turns.leave(self)
