from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any

import numpy as np
import pytest

from ernie_cluster.errors import ReplicaLost, TransferFailed
from ernie_cluster.transport.base import Message, Payload
from ernie_cluster.transport.object_store import ObjectStoreChannel, ObjectStoreReceiver
from tests.unit.transport.conformance import TIMEOUT_S, Connect, RecordingSink, TransportLaws, header, seen, send


class FakeStore:
    """Immutable objects by number, and an actor with several threads that takes messages in any order."""

    def __init__(self, receiver: ObjectStoreReceiver) -> None:
        self.objects: dict[int, bytes] = {}
        self._receiver = receiver
        self._actor = ThreadPoolExecutor(max_workers=3)
        self.failure: Exception | None = None

    def put(self, array: Payload) -> int:
        ref = len(self.objects)
        self.objects[ref] = array.tobytes()
        return ref

    def deliver(self, message: Message, refs: list[Any]) -> Future[Message]:
        if self.failure is not None:
            raise self.failure
        return self._actor.submit(self._receive, message, refs)

    def _receive(self, message: Message, refs: list[int]) -> Message:
        payload = np.frombuffer(self.objects[refs[0]], np.uint8) if refs else None
        return self._receiver.receive(message, payload).result(TIMEOUT_S)

    def close(self) -> None:
        self._actor.shutdown(wait=False, cancel_futures=True)


@pytest.fixture
def receiver() -> Iterator[ObjectStoreReceiver]:
    with closing(ObjectStoreReceiver(RecordingSink(), "decode-0")) as receiver:
        yield receiver


@pytest.fixture
def store(receiver: ObjectStoreReceiver) -> Iterator[FakeStore]:
    with closing(FakeStore(receiver)) as store:
        yield store
        receiver.close()  # lets threads that wait for replies go


@pytest.fixture
def channel(store: FakeStore) -> Iterator[ObjectStoreChannel]:
    with closing(ObjectStoreChannel(store.put, store.deliver, "prefill-0")) as channel:
        yield channel


class TestObjectStore(TransportLaws):
    @pytest.fixture
    def connect(self, store: FakeStore) -> Iterator[Connect]:
        with ExitStack() as stack:
            yield lambda: stack.enter_context(
                closing(ObjectStoreChannel(store.put, store.deliver, "prefill-0", max_in_flight_bytes=1 << 20))
            )


def test_a_corrupted_object_never_reaches_the_sink(channel: ObjectStoreChannel, store: FakeStore) -> None:
    put = store.put
    channel._put = lambda array: put(array ^ np.uint8(1))
    with pytest.raises(TransferFailed, match="damaged on the way"):
        send(channel, header(0, 4), b"data").result(TIMEOUT_S)
    assert seen(channel) == []


def test_a_store_that_is_full_fails_the_piece_only(channel: ObjectStoreChannel, store: FakeStore) -> None:
    put = store.put
    channel._put = _raise_memory_error
    with pytest.raises(TransferFailed, match="MemoryError"):
        send(channel, header(0, 4), b"data").result(TIMEOUT_S)
    channel._put = put
    assert send(channel, header(1, 4), b"data").result(TIMEOUT_S) is None


@pytest.mark.parametrize(("failure", "is_over"), [(ReplicaLost("the actor died"), True), (OSError("hiccup"), False)])
def test_only_a_lost_replica_ends_the_channel(
    channel: ObjectStoreChannel, store: FakeStore, failure: Exception, is_over: bool
) -> None:
    store.failure = failure
    with pytest.raises(ReplicaLost if is_over else TransferFailed, match=str(failure)):
        send(channel, header(0, 4), b"data").result(TIMEOUT_S)
    store.failure = None
    after = send(channel, header(1, 4), b"data")
    if is_over:
        with pytest.raises(ReplicaLost, match="the actor died"):
            after.result(TIMEOUT_S)
    else:
        assert after.result(TIMEOUT_S) is None


@pytest.mark.parametrize(
    "message",
    [
        {"kind": "piece"},
        {"kind": "piece", "request_id": "r", "epoch": None, "piece": 0, "nbytes": 1, "detail": [], "checksum": 0},
        {"kind": "call", "body": 3},
        {"kind": "nonsense"},
        {},
    ],
)
def test_a_message_that_makes_no_sense_is_refused(receiver: ObjectStoreReceiver, message: Message) -> None:
    assert "refused" in receiver.receive(message, np.zeros(1, np.uint8)).result(0)


def test_the_actor_tells_of_senders_that_died_without_a_bye() -> None:
    sink = RecordingSink()
    ObjectStoreReceiver(sink, "decode-0").disconnected("prefill-3")
    assert sink.gone == ["prefill-3"]


def _raise_memory_error(array: Payload) -> int:
    raise MemoryError("object store is full")


class _Ref:
    """What a store gives for an object, which lives as long as anybody has it."""


def test_objects_that_nobody_took_go_with_the_channel() -> None:
    """The receiver's process stands still, with pieces on their way to it."""
    refs: list[weakref.ref[_Ref]] = []

    def put(payload: object) -> _Ref:
        refs.append(weakref.ref(ref := _Ref()))
        return ref

    def deliver(message: Message, sent: list[_Ref]) -> Future[Message]:
        unanswered: Future[Message] = Future()
        unanswered.refs = sent  # type: ignore[attr-defined]
        return unanswered

    with closing(ObjectStoreChannel(put, deliver, "prefill-0", stall_timeout_s=0.05)) as channel:
        pushes = [send(channel, header(i, 4), b"data") for i in range(3)]
        for push in pushes:
            with pytest.raises(ReplicaLost, match="not acknowledged"):
                push.result(TIMEOUT_S)
    gc.collect()
    assert [ref() for ref in refs] == [None] * 3
