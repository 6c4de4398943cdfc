"""Measure the shared-memory transport between two processes, beside one core's memcpy in the same run.

    python scripts/bench/transport.py [rounds]

The receiver runs in a process of its own and copies every piece to its place; so both copies, both checksums and all
messages are in the figures. Best of `rounds` for rates, median for round trips.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np

from ernie_cluster.transport.base import Channel, Message, Payload, PieceHeader, Reply
from ernie_cluster.transport.shared_memory import SharedMemoryChannel, SharedMemoryReceiver

TOTAL_BYTES = 64 << 20
TIMEOUT_S = 30.0


class CopyingSink:
    """Puts piece n at n * nbytes of one buffer, as an engine puts KV in its blocks."""

    def __init__(self) -> None:
        self._place = np.ones(TOTAL_BYTES, np.uint8)

    def accept(self, header: PieceHeader, payload: Payload) -> None:
        start = header.piece * header.nbytes
        np.copyto(self._place[start : start + header.nbytes], payload)

    def handle(self, message: Message, reply: Reply) -> None:
        reply(message)

    def disconnected(self, peer: str) -> None:
        pass


def serve(pipe: Connection) -> None:
    """Receiving process: tell the address, serve until the pipe closes."""
    receiver = SharedMemoryReceiver(CopyingSink())
    pipe.send(receiver.address)
    pipe.poll(None)
    receiver.close()


def seconds(work: Callable[[], object], rounds: int) -> list[float]:
    """Time of each round, after one to warm up."""
    work()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return times


def hand_over(channel: Channel, source: Payload, piece_bytes: int) -> None:
    """Send all of `source` in pieces; raises if one of them fails."""
    futures = []
    for piece in range(len(source) // piece_bytes):
        part = source[piece * piece_bytes : (piece + 1) * piece_bytes]
        header = PieceHeader("bench", 0, piece, piece_bytes, ())
        futures.append(channel.push(header, lambda payload, part=part: np.copyto(payload, part)))  # type: ignore[misc]
    for future in reversed(futures):  # the last ends last: no thread is woken for each
        future.result(TIMEOUT_S)


def main(rounds: int) -> None:
    context = multiprocessing.get_context("spawn")
    pipe, child_pipe = context.Pipe()
    process = context.Process(target=serve, args=(child_pipe,), daemon=True)
    process.start()
    child_pipe.close()
    channel = SharedMemoryChannel(pipe.recv(), "bench")

    source = np.random.default_rng(0).integers(0, 256, TOTAL_BYTES, dtype=np.uint8)
    target = np.ones_like(source)
    memcpy_s = min(seconds(lambda: np.copyto(target, source), rounds))
    print(f"memcpy, one core, 64 MiB       {memcpy_s * 1e3:7.2f} ms  {TOTAL_BYTES / memcpy_s / 1e9:6.2f} GB/s")
    for piece_bytes in (4 << 20, 1 << 20, 256 << 10):
        best_s = min(seconds(lambda size=piece_bytes: hand_over(channel, source, size), rounds))  # type: ignore[misc]
        print(
            f"hand-over, pieces of {piece_bytes >> 10:4d} KiB {best_s * 1e3:7.2f} ms  {TOTAL_BYTES / best_s / 1e9:6.2f} GB/s"
            f"  = {memcpy_s / best_s:.0%} of memcpy"
        )
    small = source[: 4 << 10]
    piece_s = statistics.median(seconds(lambda: hand_over(channel, small, len(small)), rounds * 50))
    call_s = statistics.median(seconds(lambda: channel.call({"op": "ping"}, TIMEOUT_S).result(TIMEOUT_S), rounds * 50))
    print(f"round trip p50, 4 KiB piece    {piece_s * 1e6:7.0f} us")
    print(f"round trip p50, control call   {call_s * 1e6:7.0f} us")

    channel.close()
    pipe.close()
    process.join(TIMEOUT_S)


if __name__ == "__main__":
    main(rounds=int(sys.argv[1]) if len(sys.argv) > 1 else 20)
