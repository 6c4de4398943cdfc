"""Pieces and messages that come to grief on purpose, over the transports that a machine without GPUs has."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
from numpy.typing import NDArray

from ernie_cluster.config.faults import FaultRule, FaultsConfig
from ernie_cluster.errors import ReplicaLost, TransferFailed
from ernie_cluster.faults import Faults
from ernie_cluster.transport import inbox
from ernie_cluster.transport.base import Channel, Message, PieceHeader, Reply
from ernie_cluster.transport.faulty import FaultyChannel, FaultySink
from ernie_cluster.transport.local import LocalChannel, LocalReceiver
from ernie_cluster.transport.shared_memory import SharedMemoryChannel, SharedMemoryReceiver

SENT = np.arange(1000, dtype=np.uint8)
KINDS = ("shared memory", "object store")


class Kept:
    """A `Sink` that keeps what comes."""

    def __init__(self) -> None:
        self.payloads: list[NDArray[np.uint8]] = []

    def accept(self, header: PieceHeader, payload: NDArray[np.uint8]) -> None:
        self.payloads.append(np.array(payload))

    def handle(self, message: Message, reply: Reply) -> None:
        reply({"heard": message["type"]})

    def disconnected(self, peer: str) -> None:
        pass


@contextmanager
def joined(kind: str, *rules: FaultRule, stall_timeout_s: float = 10.0) -> Iterator[tuple[Channel, Kept]]:
    faults, sink = Faults("prefill", "x", FaultsConfig(True, 0, rules)), Kept()
    with ExitStack() as stack:
        channel: Channel
        if kind == "shared memory":
            receiver = SharedMemoryReceiver(FaultySink(sink, faults))
            stack.callback(receiver.close)
            channel = SharedMemoryChannel(receiver.address, "x", stall_timeout_s)
        else:
            local = LocalReceiver(FaultySink(sink, faults))
            stack.callback(local.close)
            channel = LocalChannel(local, stall_timeout_s=stall_timeout_s)
        faulty = FaultyChannel(channel, faults)
        stack.callback(faulty.close)
        yield faulty, sink


def push(channel: Channel, number: int = 0) -> Future[None]:
    return channel.push(PieceHeader("r", 0, number, len(SENT), ()), lambda out: np.copyto(out, SENT))


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_is_noticed_and_the_next_try_is_whole(kind: str) -> None:
    with joined(kind, FaultRule("transport.push", "corrupt", times=1)) as (channel, sink):
        with pytest.raises(TransferFailed, match="damaged"):
            push(channel).result(10)
        assert sink.payloads == []
        push(channel, 1).result(10)
        np.testing.assert_array_equal(sink.payloads, [SENT])


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_checksum_the_wrong_bytes_would_be_taken(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above proves is the checksum's doing, and the fault is a real one."""
    real = inbox.accept

    def blind(sink: object, header: PieceHeader, digest: int, payload: NDArray[np.uint8]) -> str | None:
        return real(sink, header, inbox.checksum(payload), payload)  # type: ignore[arg-type]

    monkeypatch.setattr(inbox, "accept", blind)
    with joined(kind, FaultRule("transport.push", "corrupt")) as (channel, sink):
        push(channel).result(10)
        assert np.count_nonzero(sink.payloads[0] != SENT) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_dropped_piece_is_heard_of_by_silence_alone(kind: str) -> None:
    with joined(kind, FaultRule("transport.push", "drop"), stall_timeout_s=0.2) as (channel, sink):
        with pytest.raises(ReplicaLost, match="acknowledged"):
            push(channel).result(10)
        assert sink.payloads == []


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_fails_its_piece_alone(kind: str) -> None:
    with joined(kind, FaultRule("transport.push", "error", times=1)) as (channel, sink):
        with pytest.raises(TransferFailed, match="injected"):
            push(channel).result(10)
        push(channel, 1).result(10)
        assert len(sink.payloads) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_receiving_side_may_refuse(kind: str) -> None:
    with (
        joined(kind, FaultRule("transport.accept", "error", times=1)) as (channel, sink),
        pytest.raises(TransferFailed, match=r"transport\.accept"),
    ):
        push(channel).result(10)
    assert sink.payloads == []


@pytest.mark.parametrize("kind", KINDS)
def test_messages_are_late_lost_or_refused_by_their_kind(kind: str) -> None:
    rules = (
        FaultRule("transport.call", "delay", lasts_s=0.05, times=1),
        FaultRule("transport.commit", "error", times=1),
        FaultRule("transport.commit", "drop", times=1, after=1),
    )
    with joined(kind, *rules) as (channel, _):
        start = time.monotonic()
        assert channel.call({"type": "claim"}, 10.0).result(10) == {"heard": "claim"}
        assert time.monotonic() - start >= 0.05
        with pytest.raises(TransferFailed, match="injected"):
            channel.call({"type": "commit"}, 10.0).result(10)
        with pytest.raises(TransferFailed, match="no reply"):
            channel.call({"type": "commit"}, 0.05).result(10)
        assert channel.call({"type": "commit"}, 10.0).result(10) == {"heard": "commit"}
