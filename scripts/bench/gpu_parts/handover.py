"""The hand-over between two processes on one GPU: through CUDA IPC, sealed, verified and copied to its place."""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.connection import Connection

import torch

from ernie_cluster.actors.gpu_ways import GpuWays
from ernie_cluster.config.transport import TransportConfig
from ernie_cluster.transport.base import Channel, Message, PieceHeader, Reply
from gpu_parts.bounds import Bounds
from gpu_parts.report import Row

_TIMEOUT_S = 60.0
_CONFIG = TransportConfig(kind="ipc")
GOAL = 0.60


class CopyingSink:
    """Puts piece n at n * nbytes of one buffer on the GPU, as an engine puts KV in its blocks."""

    def __init__(self, total_bytes: int, device: torch.device) -> None:
        self._place = torch.zeros(total_bytes, dtype=torch.uint8, device=device)

    def accept(self, header: PieceHeader, payload: object) -> None:
        start = header.piece * header.nbytes
        self._place[start : start + header.nbytes].copy_(torch.as_tensor(payload))

    def handle(self, message: Message, reply: Reply) -> None:
        """Says what lies where the message asks, so that the sender can compare."""
        reply({"sum": int(self._place.view(torch.int64).sum())})

    def disconnected(self, peer: str) -> None:
        pass


def _serve(total_bytes: int, line: Connection) -> None:
    """Receiving process: tell the address, serve until the line closes."""
    device = torch.device("cuda", 0)
    ways = GpuWays(CopyingSink(total_bytes, device), device, "127.0.0.1", _CONFIG)  # type: ignore[arg-type]
    line.send(ways.endpoint.address)
    line.poll(None)
    ways.close()


def _push(channel: Channel, source: torch.Tensor, piece_bytes: int) -> None:
    futures = []
    for piece in range(len(source) // piece_bytes):
        part = source[piece * piece_bytes : (piece + 1) * piece_bytes]
        header = PieceHeader("bench", 0, piece, piece_bytes, ())
        futures.append(channel.push(header, lambda payload, part=part: torch.as_tensor(payload).copy_(part)))  # type: ignore[misc]
    for future in reversed(futures):
        future.result(_TIMEOUT_S)


def measure(bounds: Bounds, *, total_bytes: int = 1 << 30, rounds: int = 5) -> Row:
    """Best of `rounds`; raises when bytes are not what was sent."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(total_bytes, theirs), daemon=True)
    process.start()
    theirs.close()
    device = torch.device("cuda", 0)
    try:
        ways = GpuWays(CopyingSink(8, device), device, "127.0.0.1", _CONFIG)  # type: ignore[arg-type]
        if not ours.poll(_TIMEOUT_S):
            raise TimeoutError(f"the receiving process said nothing for {_TIMEOUT_S:.0f} s")
        address = ours.recv()
        channel = ways.open("ipc", address, "bench")
        source = torch.randint(0, 256, (total_bytes,), dtype=torch.uint8, device=device)
        times = []
        for _ in range(rounds + 1):
            torch.cuda.synchronize()
            start = time.perf_counter()
            _push(channel, source, _CONFIG.piece_bytes)
            times.append(time.perf_counter() - start)
        there = channel.call({"op": "sum"}, _TIMEOUT_S).result(_TIMEOUT_S)["sum"]
        assert there == int(source.view(torch.int64).sum()), "the receiver has other bytes than were sent"
        channel.close()
        ways.close()
    finally:
        ours.close()
        process.join(_TIMEOUT_S)
    rate = total_bytes / min(times[1:])
    return Row(
        f"hand-over by CUDA IPC, two processes, {total_bytes >> 20} MiB in pieces of {_CONFIG.piece_bytes >> 20} MiB",
        f"{rate / 1e9:.0f} GB/s",
        rate / bounds.copy_bytes,
        GOAL,
        "of copying on the device",
    )
