"""The shared-memory transport: its laws within one process and across two, what dies, and what is left behind."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, closing, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import pytest

from ernie_cluster.errors import ReplicaLost, TransferFailed
from ernie_cluster.transport import wire
from ernie_cluster.transport.shared_memory import SharedMemoryChannel, SharedMemoryReceiver
from ernie_cluster.transport.staging import Staging, create_memory, host_id
from tests.unit.transport.conformance import TIMEOUT_S, Connect, RecordingSink, TransportLaws, header, seen, send

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memfd and abstract sockets are Linux's")

STAGING_BYTES = 1 << 20


@pytest.fixture
def sink() -> RecordingSink:
    return RecordingSink()


@pytest.fixture
def receiver(sink: RecordingSink) -> Iterator[SharedMemoryReceiver]:
    with closing(SharedMemoryReceiver(sink, STAGING_BYTES)) as receiver:
        yield receiver


@pytest.fixture
def channel(receiver: SharedMemoryReceiver) -> Iterator[SharedMemoryChannel]:
    with closing(SharedMemoryChannel(receiver.address, "prefill-0")) as channel:
        yield channel


class TestWithinOneProcess(TransportLaws):
    @pytest.fixture
    def connect(self, receiver: SharedMemoryReceiver) -> Iterator[Connect]:
        with ExitStack() as stack:
            yield lambda: stack.enter_context(closing(SharedMemoryChannel(receiver.address, "prefill-0")))


@pytest.fixture(scope="module")
def server() -> Iterator[Child]:
    with Child(serve) as child:
        yield child


class TestAcrossTwoProcesses(TransportLaws):
    @pytest.fixture
    def connect(self, server: Child) -> Iterator[Connect]:
        address = server.new_receiver()
        with ExitStack() as stack:
            yield lambda: stack.enter_context(closing(SharedMemoryChannel(address, "prefill-0")))


class Child:
    """A process that runs `target(pipe, *args)`; killed at the end if it still lives."""

    def __init__(self, target: Callable[..., None], *args: object) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=target, args=(theirs, *args))
        self.process.start()
        theirs.close()

    def new_receiver(self) -> str:
        """Address of a fresh receiver, where the target is `serve`."""
        self.pipe.send("new")
        assert self.pipe.poll(TIMEOUT_S)
        address = self.pipe.recv()
        assert isinstance(address, str)
        return address

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.pipe.close()  # asks `serve` to end
        self.process.join(TIMEOUT_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join(TIMEOUT_S)
        self.process.close()


def serve(pipe: Connection) -> None:
    """Child: a new receiver with a new sink whenever asked, until the parent closes the pipe."""
    with suppress(EOFError):
        while pipe.recv() == "new":
            with closing(SharedMemoryReceiver(RecordingSink(), STAGING_BYTES)) as receiver:
                pipe.send(receiver.address)
                pipe.poll(None)


def push_without_end(pipe: Connection, address: str) -> None:
    """Child: keep the channel full until killed."""
    channel = SharedMemoryChannel(address, "prefill-to-be-killed")
    for piece in range(1_000_000):
        future = send(channel, header(piece, 100_000), bytes(100_000))
        if piece % 50 == 49:
            future.result(TIMEOUT_S)


def resources() -> Counter[str]:
    """What the descriptors of this process are open on, and its threads."""
    gc.collect()
    resource_tracker.ensure_running()  # by the first process that is spawned otherwise, and it keeps a descriptor
    held = Counter(thread.name for thread in threading.enumerate())
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the one that listed the others
            held[os.readlink(f"/proc/self/fd/{fd}")] += 1
    return held


def given_back(before: Counter[str]) -> bool:
    """Whether nothing is held that was not before, in time; what is over is printed."""
    if eventually(lambda: not resources() - before):
        return True
    print("held still:", resources() - before)
    return False


def eventually(claim: Callable[[], bool]) -> bool:
    """Whether a claim about another thread or the kernel, which nothing announces, becomes true in time."""
    deadline = time.monotonic() + TIMEOUT_S
    while not claim():
        if time.monotonic() > deadline:
            return False
        threading.Event().wait(0.005)
    return True


def test_a_killed_receiver_fails_every_future_at_once() -> None:
    before = resources()
    with Child(serve) as child, closing(SharedMemoryChannel(child.new_receiver(), "prefill-0")) as channel:
        calls = [channel.call({"op": "never"}, TIMEOUT_S) for _ in range(3)]
        assert send(channel, header(0, 400_000), bytes(400_000)).result(TIMEOUT_S) is None
        child.signal(signal.SIGSTOP)  # in mid-transfer: pieces that were packed and nobody takes
        pieces = [send(channel, header(i, 400_000), bytes(400_000)) for i in range(1, 6)]
        assert eventually(pieces[1].running)
        child.signal(signal.SIGKILL)
        start = time.monotonic()
        outstanding: list[Future[Any]] = [*pieces, *calls]
        for future in outstanding:
            with pytest.raises(ReplicaLost, match=r"closed the connection or died|reset"):
                future.result(TIMEOUT_S)
        assert time.monotonic() - start < 2.0
        with pytest.raises(ReplicaLost):
            send(channel, header(9, 4), b"more").result(0)
    assert given_back(before)


def test_a_killed_sender_is_reported_and_leaves_nothing() -> None:
    sink = RecordingSink()
    before = resources()
    with closing(SharedMemoryReceiver(sink, STAGING_BYTES)) as receiver:
        idle = resources()
        with Child(push_without_end, receiver.address) as child:
            assert eventually(lambda: len(sink.pieces) > 20)
            child.signal(signal.SIGKILL)
            assert sink.one_is_gone.wait(2.0)
            assert sink.gone == ["prefill-to-be-killed"]
        assert given_back(idle)
        with closing(SharedMemoryChannel(receiver.address, "next")) as channel:
            assert send(channel, header(0, 4), b"data").result(TIMEOUT_S) is None
    assert given_back(before)


def test_a_receiver_that_stands_still_is_lost_after_the_stall_timeout() -> None:
    with (
        Child(serve) as child,
        closing(SharedMemoryChannel(child.new_receiver(), "prefill-0", stall_timeout_s=0.2)) as channel,
    ):
        child.signal(signal.SIGSTOP)
        with pytest.raises(ReplicaLost, match="not acknowledged"):
            send(channel, header(0, 4), b"data").result(TIMEOUT_S)
        child.signal(signal.SIGCONT)


def test_closing_the_receiver_fails_the_senders(channel: SharedMemoryChannel, receiver: SharedMemoryReceiver) -> None:
    call = channel.call({"op": "never"}, TIMEOUT_S)
    assert channel.call({"op": "echo"}, TIMEOUT_S).result(TIMEOUT_S) == {"op": "echo"}
    receiver.close()
    receiver.close()
    with pytest.raises(ReplicaLost):
        call.result(TIMEOUT_S)
    with pytest.raises(ReplicaLost, match="cannot be reached"):
        SharedMemoryChannel(receiver.address, "too-late")


def test_closing_a_channel_tells_the_sink(channel: SharedMemoryChannel, sink: RecordingSink) -> None:
    channel.close()
    assert sink.one_is_gone.wait(TIMEOUT_S)
    assert sink.gone == ["prefill-0"]


def test_everything_is_given_back(sink: RecordingSink) -> None:
    before = resources()
    for _ in range(5):
        with closing(SharedMemoryReceiver(sink, STAGING_BYTES)) as receiver:
            channels = [SharedMemoryChannel(receiver.address, f"prefill-{i}") for i in range(3)]
            for channel in channels:
                assert send(channel, header(0, 1000), bytes(1000)).result(TIMEOUT_S) is None
            channels[0].close()
        for channel in channels:
            channel.close()
    assert given_back(before)


def test_no_name_is_left_in_shared_memory(channel: SharedMemoryChannel) -> None:
    assert send(channel, header(0, 4), b"data").result(TIMEOUT_S) is None
    assert not [name for name in os.listdir("/dev/shm") if "ernie" in name]


def test_a_wrong_token_is_refused(receiver: SharedMemoryReceiver, sink: RecordingSink) -> None:
    scheme, name, token = receiver.address.split(":")
    for wrong in (token[:-1] + ("0" if token[-1] != "0" else "1"), "x", "ü"):
        with pytest.raises(TransferFailed, match="refused the handshake") as refusal:
            SharedMemoryChannel(f"{scheme}:{name}:{wrong}", "stranger")
        assert token not in str(refusal.value)
    assert sink.gone == []


@pytest.mark.parametrize("address", ["", "shm", "shm:name", "tcp:name:token"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(TransferFailed, match="not the address"):
        SharedMemoryChannel(address, "stranger")


def test_another_user_is_refused(receiver: SharedMemoryReceiver, monkeypatch: pytest.MonkeyPatch) -> None:
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    with pytest.raises((TransferFailed, ReplicaLost)):
        SharedMemoryChannel(receiver.address, "stranger")


class RawSender:
    """A sender that speaks the frames by hand, and lies."""

    def __init__(self, address: str, version: int = wire.VERSION) -> None:
        _, name, token = address.split(":")
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(f"\0{name}")
        self.send(wire.Kind.HELLO, json.dumps({"version": version, "token": token, "peer": "liar"}).encode())
        self.frame, fds, _, _ = socket.recv_fds(self.sock, 4096, 1)
        self.memory = Staging(fds[0], STAGING_BYTES, writable=True) if fds else None
        for fd in fds:
            os.close(fd)

    def send(self, kind: wire.Kind, body: bytes) -> None:
        self.sock.sendall(wire.encode(kind, body))

    def answer(self) -> tuple[int, bytes]:
        """Kind and body of the next frame; (0, b"") at the end of the connection."""
        with suppress(ConnectionResetError):
            data = self.sock.recv(4096)
            for kind, body in wire.FrameReader().feed(data):
                return kind, body
        return 0, b""

    def close(self) -> None:
        self.sock.close()
        if self.memory:
            self.memory.close()


def test_bytes_that_changed_after_the_checksum_never_reach_the_sink(
    receiver: SharedMemoryReceiver, channel: SharedMemoryChannel
) -> None:
    with closing(RawSender(receiver.address)) as liar:
        assert liar.memory is not None
        liar.memory.bytes[:100] = 7
        good = wire.checksum(liar.memory.bytes[:100])
        liar.send(wire.Kind.PIECE, wire.encode_piece(1, 0, good, header(0, 100)))
        assert liar.answer()[0] == wire.Kind.ACK
        liar.memory.bytes[50] ^= 1
        liar.send(wire.Kind.PIECE, wire.encode_piece(2, 0, good, header(1, 100)))
        kind, body = liar.answer()
        assert kind == wire.Kind.FAIL
        assert b"damaged on the way" in body
    assert [piece[2] for piece in seen(channel)] == [0]


@pytest.mark.parametrize("offset", [STAGING_BYTES - 50, STAGING_BYTES, 2**63, 2**64 - 1])
def test_a_piece_outside_the_memory_is_refused(receiver: SharedMemoryReceiver, offset: int) -> None:
    digest = wire.checksum(np.zeros(0, np.uint8))
    with closing(RawSender(receiver.address)) as liar:
        liar.send(wire.Kind.PIECE, wire.encode_piece(1, offset, digest, header(0, 100)))
        kind, body = liar.answer()
        assert kind == wire.Kind.FAIL
        assert b"of 100 bytes" in body


@pytest.mark.parametrize(
    "frame",
    [
        b"\xff\xff\xff\xff\x04",
        wire.encode(wire.Kind.WELCOME, b"{}"),
        wire.encode(wire.Kind.PIECE, b"short"),
        wire.encode(wire.Kind.CALL, b"short"),
        wire.encode(wire.Kind.CALL, wire.with_id(1, b"no json")),
    ],
)
def test_frames_that_make_no_sense_end_their_connection_only(
    receiver: SharedMemoryReceiver, channel: SharedMemoryChannel, frame: bytes
) -> None:
    with closing(RawSender(receiver.address)) as liar:
        liar.sock.sendall(frame)
        assert liar.answer() == (0, b"")
    assert channel.call({"op": "echo"}, TIMEOUT_S).result(TIMEOUT_S) == {"op": "echo"}


def test_another_version_is_refused(receiver: SharedMemoryReceiver) -> None:
    with closing(RawSender(receiver.address, version=wire.VERSION + 1)) as stranger:
        assert stranger.memory is None


def test_the_size_of_the_memory_cannot_be_changed() -> None:
    fd = create_memory(4096)
    try:
        for size in (0, 8192):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
        with pytest.raises(TransferFailed, match="4096 bytes, 8192 were announced"):
            Staging(fd, 8192, writable=True)
    finally:
        os.close(fd)


def test_host_id_is_the_same_in_every_process_of_the_host() -> None:
    with Child(tell_host_id) as child:
        assert child.pipe.recv() == host_id()


def tell_host_id(pipe: Connection) -> None:
    pipe.send(host_id())
