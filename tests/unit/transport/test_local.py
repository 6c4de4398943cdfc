from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

from ernie_cluster.errors import ReplicaLost, TransferFailed
from ernie_cluster.transport.local import Faults, LocalChannel, LocalReceiver
from tests.unit.transport.conformance import TIMEOUT_S, Connect, RecordingSink, TransportLaws, header, seen, send


@pytest.fixture
def sink() -> RecordingSink:
    return RecordingSink()


@pytest.fixture
def receiver(sink: RecordingSink) -> Iterator[LocalReceiver]:
    with closing(LocalReceiver(sink)) as receiver:
        yield receiver


class TestLocal(TransportLaws):
    @pytest.fixture
    def connect(self, receiver: LocalReceiver) -> Iterator[Connect]:
        with ExitStack() as stack:
            yield lambda: stack.enter_context(closing(LocalChannel(receiver, max_in_flight_bytes=1 << 20)))


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def channel(receiver: LocalReceiver, faults: Faults) -> Iterator[LocalChannel]:
    with closing(LocalChannel(receiver, "prefill-0", faults)) as channel:
        yield channel


def test_a_corrupted_piece_never_reaches_the_sink(channel: LocalChannel, faults: Faults) -> None:
    faults.corrupt(1)
    sent = [send(channel, header(i, 4), b"data") for i in range(3)]
    with pytest.raises(TransferFailed, match="damaged on the way"):
        sent[1].result(TIMEOUT_S)
    assert [piece[2] for piece in seen(channel)] == [0, 2]


def test_an_injected_failure_leaves_the_channel_up(channel: LocalChannel, faults: Faults) -> None:
    faults.fail(0)
    with pytest.raises(TransferFailed, match="injected"):
        send(channel, header(0, 4), b"data").result(TIMEOUT_S)
    assert send(channel, header(1, 4), b"data").result(TIMEOUT_S) is None


def test_a_lost_peer_fails_everything_at_once(channel: LocalChannel, faults: Faults, sink: RecordingSink) -> None:
    faults.lose(1)
    call = channel.call({"op": "never"}, TIMEOUT_S)
    sent = [send(channel, header(i, 4), b"data") for i in range(3)]
    assert sent[0].result(TIMEOUT_S) is None
    for future in (sent[1], call):
        with pytest.raises(ReplicaLost, match="injected"):
            future.result(TIMEOUT_S)
    assert sink.one_is_gone.wait(TIMEOUT_S)
    assert sink.gone == ["prefill-0"]


def test_a_dropped_piece_is_noticed_by_the_stall_timeout(receiver: LocalReceiver, faults: Faults) -> None:
    faults.drop(0)
    with closing(LocalChannel(receiver, faults=faults, stall_timeout_s=0.05)) as channel:
        sent = [send(channel, header(i, 4), b"data") for i in range(2)]
        with pytest.raises(ReplicaLost, match="not acknowledged"):
            sent[0].result(TIMEOUT_S)
        with pytest.raises(ReplicaLost):
            send(channel, header(2, 4), b"data").result(TIMEOUT_S)


def test_a_held_piece_arrives_when_released_even_after_close(channel: LocalChannel, faults: Faults) -> None:
    release = faults.hold(0)
    late = send(channel, header(0, 4), b"late")
    assert send(channel, header(1, 4), b"next").result(TIMEOUT_S) is None
    assert not late.done()
    release()
    assert late.result(TIMEOUT_S) is None
    assert [piece[2] for piece in seen(channel)] == [1, 0]


def test_a_late_write_of_a_closed_channel_still_reaches_the_receiver(receiver: LocalReceiver) -> None:
    faults = Faults()
    release = faults.hold(0)
    with closing(LocalChannel(receiver, faults=faults)) as old:
        late = send(old, header(0, 4), b"late")
        assert send(old, header(1, 4), b"next").result(TIMEOUT_S) is None
    with pytest.raises(ReplicaLost):
        late.result(TIMEOUT_S)
    release()
    with closing(LocalChannel(receiver)) as new:
        assert [piece[2] for piece in seen(new)] == [1, 0]


def test_closing_the_receiver_fails_outstanding_calls(channel: LocalChannel, receiver: LocalReceiver) -> None:
    call = channel.call({"op": "never"}, TIMEOUT_S)
    assert channel.call({"op": "echo"}, TIMEOUT_S).result(TIMEOUT_S) == {"op": "echo"}
    receiver.close()
    receiver.close()
    with pytest.raises(ReplicaLost, match="closed"):
        call.result(TIMEOUT_S)
    with pytest.raises(ReplicaLost):
        send(channel, header(0, 4), b"data").result(TIMEOUT_S)


def test_close_ends_the_thread(receiver: LocalReceiver) -> None:
    before = threading.active_count()
    for _ in range(3):
        LocalChannel(receiver).close()
    assert threading.active_count() == before
