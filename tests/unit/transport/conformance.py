"""Laws that every transport keeps, seen from the sender's end alone, so that the receiver may be another process.

A test module makes a fixture `connect` that returns a new channel to a receiver with a `RecordingSink`, and subclasses
`TransportLaws`.
"""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from ernie_cluster.errors import PeerSilent, ReplicaLost, TransferFailed
from ernie_cluster.transport.base import JSON, Channel, Message, Payload, PieceHeader, Reply

TIMEOUT_S = 20.0
REFUSED_EPOCH = 666
UNFORESEEN_EPOCH = 667
Connect = Callable[[], Channel]


class RecordingSink:
    """Keeps a digest of every accepted piece; does odd things on request."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.pieces: list[JSON] = []
        self.gone: list[str] = []
        self.one_is_gone = threading.Event()
        self._unanswered: list[Reply] = []

    def accept(self, header: PieceHeader, payload: Payload) -> None:
        assert payload.shape == (header.nbytes,)
        assert not payload.flags.writeable
        if header.epoch == REFUSED_EPOCH:
            raise TransferFailed(f"epoch {header.epoch} is not the lease's")
        if header.epoch == UNFORESEEN_EPOCH:
            raise KeyError("a bug in the sink")
        with self._lock:
            self.pieces.append(
                [header.request_id, header.epoch, header.piece, list(header.detail), digest(payload.tobytes())]
            )

    def handle(self, message: Message, reply: Reply) -> None:
        match message["op"]:
            case "echo":
                reply(message)
            case "later":
                threading.Thread(target=reply, args=({"thread": "another"},)).start()
            case "twice":
                reply({"answer": 1})
                reply({"answer": 2})
            case "never":
                self._unanswered.append(reply)
            case "seen":
                with self._lock:
                    pieces, self.pieces = self.pieces, []
                reply({"seen": pieces})
            case "no json":
                reply({"answer": object()})  # type: ignore[dict-item]
            case op:
                raise ValueError(f"op {op}")

    def disconnected(self, peer: str) -> None:
        self.gone.append(peer)
        self.one_is_gone.set()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def header(piece: int = 0, nbytes: int = 100, *, epoch: int = 1, detail: tuple[int, ...] = (0, 4, 0, 7)) -> PieceHeader:
    return PieceHeader("req-ü-1", epoch, piece, nbytes, detail)


def send(channel: Channel, head: PieceHeader, data: bytes) -> Future[None]:
    return channel.push(head, lambda payload: payload.__setitem__(slice(None), np.frombuffer(data, np.uint8)))


def seen(channel: Channel) -> list[Any]:
    """Pieces accepted since the last question: [request_id, epoch, piece, detail, digest] each."""
    pieces = channel.call({"op": "seen", "request_id": header().request_id}, TIMEOUT_S).result(TIMEOUT_S)["seen"]
    assert isinstance(pieces, list)
    return pieces


class TransportLaws:
    def test_a_piece_arrives_with_its_header(self, connect: Connect) -> None:
        channel = connect()
        head = header(piece=3, nbytes=5, epoch=7, detail=(2**62, -1))
        assert send(channel, head, b"hello").result(TIMEOUT_S) is None
        assert seen(channel) == [["req-ü-1", 7, 3, [2**62, -1], digest(b"hello")]]

    def test_a_thousand_pieces_of_random_sizes_arrive_intact(self, connect: Connect) -> None:
        channel, chance = connect(), random.Random(1)
        sizes = [int(2 ** chance.uniform(0, 18)) for _ in range(1000)]
        data = [chance.randbytes(size) for size in sizes]
        futures = [send(channel, header(i, len(part)), part) for i, part in enumerate(data)]
        for future in futures:
            future.result(TIMEOUT_S)
        assert sorted((piece, found) for _, _, piece, _, found in seen(channel)) == [
            (i, digest(part)) for i, part in enumerate(data)
        ]

    def test_pieces_larger_than_half_of_what_may_be_in_flight_are_refused(self, connect: Connect) -> None:
        channel = connect()
        most = channel.max_piece_bytes
        assert send(channel, header(0, most), bytes(most)).result(TIMEOUT_S) is None
        for nbytes in (most + 1, 0, -1):
            with pytest.raises(TransferFailed, match=f"has {nbytes} bytes.*{most}.*plan_pieces"):
                channel.push(header(1, nbytes), _never).result(TIMEOUT_S)
        assert len(seen(channel)) == 1

    def test_more_than_fits_at_once_waits_for_room(self, connect: Connect) -> None:
        channel = connect()
        most = channel.max_piece_bytes
        futures = [send(channel, header(i, most), bytes([i]) * most) for i in range(7)]
        for future in futures:
            future.result(TIMEOUT_S)
        assert sorted(piece[2] for piece in seen(channel)) == list(range(7))

    def test_the_sink_refuses_with_its_own_words_and_the_channel_goes_on(self, connect: Connect) -> None:
        channel = connect()
        with pytest.raises(TransferFailed, match="epoch 666 is not the lease's"):
            send(channel, header(0, 4, epoch=REFUSED_EPOCH), b"late").result(TIMEOUT_S)
        assert send(channel, header(1, 4), b"good").result(TIMEOUT_S) is None
        assert [piece[2] for piece in seen(channel)] == [1]

    def test_a_bug_in_the_sink_is_a_refusal(self, connect: Connect) -> None:
        channel = connect()
        with pytest.raises(TransferFailed, match=r"KeyError.*a bug in the sink"):
            send(channel, header(0, 4, epoch=UNFORESEEN_EPOCH), b"data").result(TIMEOUT_S)
        assert send(channel, header(1, 4), b"good").result(TIMEOUT_S) is None

    def test_packing_that_fails_fails_its_piece_only(self, connect: Connect) -> None:
        channel = connect()
        with pytest.raises(TransferFailed, match="ZeroDivisionError") as failure:
            channel.push(header(0), lambda payload: 1 / 0).result(TIMEOUT_S)  # type: ignore[arg-type]
        assert isinstance(failure.value.__cause__, ZeroDivisionError)
        assert send(channel, header(1, 4), b"good").result(TIMEOUT_S) is None
        assert [piece[2] for piece in seen(channel)] == [1]

    def test_a_header_that_does_not_fit_fails_its_piece_only(self, connect: Connect) -> None:
        channel = connect()
        future = send(channel, header(0, 4, detail=(0,) * 300_000), b"1234")
        try:
            future.result(TIMEOUT_S)
        except TransferFailed:
            assert seen(channel) == []
        else:
            assert len(seen(channel)) == 1

    def test_pack_runs_on_a_thread_of_the_channel(self, connect: Connect) -> None:
        channel, threads = connect(), []
        channel.push(header(0), lambda payload: threads.append(threading.current_thread())).result(TIMEOUT_S)
        assert threads[0] is not threading.current_thread()

    def test_a_cancelled_piece_is_never_packed(self, connect: Connect) -> None:
        channel, gate = connect(), threading.Event()
        first = channel.push(header(0), lambda payload: _wait(gate))
        second = channel.push(header(1), _never)
        assert second.cancel()
        gate.set()
        first.result(TIMEOUT_S)
        assert [piece[2] for piece in seen(channel)] == [0]

    @pytest.mark.parametrize(
        ("op", "answer"),
        [("echo", {"op": "echo"}), ("later", {"thread": "another"}), ("twice", {"answer": 1})],
    )
    def test_a_call_is_answered_once(self, connect: Connect, op: str, answer: Message) -> None:
        channel = connect()
        assert channel.call({"op": op}, TIMEOUT_S).result(TIMEOUT_S) == answer
        assert channel.call({"op": "echo", "n": 2}, TIMEOUT_S).result(TIMEOUT_S) == {"op": "echo", "n": 2}

    def test_a_call_stays_behind_the_pieces_of_its_request_pushed_before_it(self, connect: Connect) -> None:
        channel = connect()
        for i in range(50):
            send(channel, header(i, 1000), bytes(1000))
        assert len(seen(channel)) == 50

    def test_a_large_message_arrives_whole(self, connect: Connect) -> None:
        channel, message = connect(), dict[str, JSON](op="echo", text="ü" * 150_000)
        calls = [channel.call(message, TIMEOUT_S) for _ in range(4)]
        assert all(call.result(TIMEOUT_S) == message for call in calls)

    @pytest.mark.parametrize("message", [{"op": object()}, {"op": float("nan")}, {"op": "x" * (1 << 20)}])
    def test_a_message_that_cannot_be_sent_fails_its_call_only(self, connect: Connect, message: Message) -> None:
        channel = connect()
        with pytest.raises(TransferFailed, match="message"):
            channel.call(message, TIMEOUT_S).result(TIMEOUT_S)
        assert channel.call({"op": "echo"}, TIMEOUT_S).result(TIMEOUT_S) == {"op": "echo"}

    def test_a_sink_that_raises_fails_the_call_only(self, connect: Connect) -> None:
        channel = connect()
        with pytest.raises(TransferFailed, match=r"ValueError.*op nonsense"):
            channel.call({"op": "nonsense"}, TIMEOUT_S).result(TIMEOUT_S)
        assert channel.call({"op": "echo"}, TIMEOUT_S).result(TIMEOUT_S) == {"op": "echo"}

    def test_a_call_without_reply_fails_in_its_time(self, connect: Connect) -> None:
        channel = connect()
        with pytest.raises(PeerSilent, match="no reply within"):
            channel.call({"op": "never"}, 0.05).result(TIMEOUT_S)
        assert channel.call({"op": "echo"}, TIMEOUT_S).result(TIMEOUT_S) == {"op": "echo"}

    def test_close_fails_what_is_outstanding_and_is_idempotent(self, connect: Connect) -> None:
        channel, packing, gate = connect(), threading.Event(), threading.Event()
        call = channel.call({"op": "never"}, TIMEOUT_S)

        def pack(payload: Payload) -> None:
            packing.set()
            _wait(gate)

        first = channel.push(header(0), pack)
        second = channel.push(header(1), _never)
        assert packing.wait(TIMEOUT_S)
        closing = threading.Thread(target=channel.close)
        closing.start()
        gate.set()
        closing.join(TIMEOUT_S)
        for future in (call, second):
            with pytest.raises(ReplicaLost, match="closed on this side"):
                future.result(TIMEOUT_S)
        assert first.done()
        channel.close()

    def test_a_closed_channel_fails_at_once(self, connect: Connect) -> None:
        channel = connect()
        channel.close()
        with pytest.raises(ReplicaLost):
            channel.push(header(0), _never).result(0)
        with pytest.raises(ReplicaLost):
            channel.call({"op": "echo"}, TIMEOUT_S).result(0)

    def test_channels_do_not_disturb_each_other(self, connect: Connect) -> None:
        one, other = connect(), connect()
        call = other.call({"op": "echo"}, TIMEOUT_S)
        one.close()
        assert call.result(TIMEOUT_S) == {"op": "echo"}
        assert send(other, header(5, 4), b"good").result(TIMEOUT_S) is None
        assert [piece[2] for piece in seen(other)] == [5]

    def test_many_threads_may_push(self, connect: Connect) -> None:
        channel = connect()
        futures: list[Future[None]] = []

        def work(first: int) -> None:
            futures.extend(send(channel, header(i, 64), bytes([i]) * 64) for i in range(first, first + 25))

        threads = [threading.Thread(target=work, args=(25 * n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT_S)
        for future in futures:
            future.result(TIMEOUT_S)
        assert sorted(piece[2] for piece in seen(channel)) == list(range(100))


def _never(payload: Payload) -> None:
    raise AssertionError("packed though it must not be")


def _wait(gate: threading.Event) -> None:
    assert gate.wait(TIMEOUT_S)
