"""The laws of a transport for NIXL's, with Ray's part played: memory is read where it lies."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest
import torch

from ernie_cluster.actors import channels, nixl_way
from ernie_cluster.actors.channels import Receivers, check_nixl, open_nixl, receive
from ernie_cluster.actors.nixl_way import DirectTransport, NixlChannel, NixlWay
from ernie_cluster.config.transport import TransportConfig
from ernie_cluster.errors import ConfigError, ReplicaLost, TransferFailed
from ernie_cluster.transport.base import Message
from tests.unit.transport.conformance import TIMEOUT_S, Connect, RecordingSink, TransportLaws, header, seen, send

CONFIG = TransportConfig(kind="nixl", piece_bytes=1 << 18, staging_bytes=1 << 20)
NUM_SLOTS = 4
MAX_PUBLICATIONS = NUM_SLOTS * 7
"""Of one channel: pieces are rounded up to one of seven powers of two."""


class PlayedDirect(DirectTransport):
    """Memory by number; only what is registered can be published, and read into."""

    def __init__(self) -> None:
        self.registered: list[torch.Tensor] = []
        self.published: list[torch.Tensor] = []
        self.targets: set[int] = set()
        self.failures: list[Exception] = []

    def register(self, memory: torch.Tensor) -> None:
        self._maybe_fail()
        self.registered.append(memory)

    def publish(self, memory: torch.Tensor) -> int:
        assert self._is_registered(memory)
        self.published.append(memory)
        return len(self.published) - 1

    def read(self, ref: int, target: torch.Tensor, timeout_s: float) -> torch.Tensor:
        assert self._is_registered(target)
        assert timeout_s > 0
        self.targets.add(target.data_ptr())
        self._maybe_fail()
        return target.copy_(self.published[ref])

    def _is_registered(self, memory: torch.Tensor) -> bool:
        storage = memory.untyped_storage().data_ptr()
        return any(known.untyped_storage().data_ptr() == storage for known in self.registered)

    def _maybe_fail(self) -> None:
        if self.failures:
            raise self.failures.pop()


class PlayedReplica:
    """Two replicas in one: an actor whose threads take messages in any order, and a sender."""

    def __init__(self) -> None:
        self.direct = PlayedDirect()
        self.way = NixlWay(CONFIG, self.direct)
        self.receivers = Receivers(RecordingSink(), "decode-0", TransportConfig(kind="object_store"), nixl=self.way)
        self.failure: Exception | None = None
        self._actor = ThreadPoolExecutor(max_workers=3)

    def deliver(self, message: Message, refs: list[Any]) -> Future[Message]:
        if self.failure is not None:
            raise self.failure
        return self._actor.submit(lambda: asyncio.run(receive(self.receivers, message, refs)))

    def open(self) -> NixlChannel:
        return self.way.open(self.deliver, "prefill-0")

    def close(self) -> None:
        self.receivers.close()
        self._actor.shutdown(wait=False, cancel_futures=True)


@pytest.fixture
def replica() -> Iterator[PlayedReplica]:
    with closing(PlayedReplica()) as replica:
        yield replica


class TestNixl(TransportLaws):
    @pytest.fixture
    def connect(self, replica: PlayedReplica) -> Iterator[Connect]:
        made: list[NixlChannel] = []

        def connect() -> NixlChannel:
            made.append(replica.open())
            return made[-1]

        yield connect
        for channel in made:
            channel.close()
        assert len(replica.direct.published) <= MAX_PUBLICATIONS * len(made)


def test_closed_channels_leave_their_memory_to_the_next(replica: PlayedReplica) -> None:
    for number in range(3):
        channel = replica.open()
        send(channel, header(number, 4), b"good").result(TIMEOUT_S)
        channel.close()
        channel.close()
    assert len(replica.direct.registered) == 2  # the buffer to read into, and one channel's slots
    assert len(replica.direct.published) == 1


def test_two_open_channels_have_memory_of_their_own(replica: PlayedReplica) -> None:
    with closing(replica.open()) as one, closing(replica.open()) as other:
        for channel in (one, other):
            send(channel, header(0, 4), b"good").result(TIMEOUT_S)
    assert len(replica.direct.registered) == 3


def test_a_failed_read_fails_its_piece_only(replica: PlayedReplica) -> None:
    with closing(replica.open()) as channel:
        replica.direct.failures.append(RuntimeError("the network is down"))
        with pytest.raises(TransferFailed, match=r"could not be read by NIXL.*the network is down"):
            send(channel, header(0, 4), b"lost").result(TIMEOUT_S)
        for number in range(1, 2 * NUM_SLOTS):  # no slot was lost
            send(channel, header(number, 4), b"good").result(TIMEOUT_S)
        assert [piece[2] for piece in seen(channel)] == list(range(1, 2 * NUM_SLOTS))


def test_what_comes_after_a_timeout_cannot_touch_the_next_piece(replica: PlayedReplica) -> None:
    with closing(replica.open()) as channel:
        replica.direct.failures.append(TimeoutError("nothing came"))
        with pytest.raises(TransferFailed, match="nothing came"):
            send(channel, header(0, 4), b"late").result(TIMEOUT_S)
        send(channel, header(1, 4), b"good").result(TIMEOUT_S)
    assert len(replica.direct.targets) == 2


def test_a_piece_whose_turn_comes_too_late_is_not_read(replica: PlayedReplica, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_way, "FETCH_TIMEOUT_S", 0.0)
    with closing(replica.open()) as channel, pytest.raises(TransferFailed, match="its turn did not come"):
        send(channel, header(0, 4), b"late").result(TIMEOUT_S)
    assert not replica.direct.targets


def test_deliveries_that_fail_give_their_slots_back_and_a_lost_replica_ends_the_channel(
    replica: PlayedReplica,
) -> None:
    with closing(replica.open()) as channel:
        replica.failure = OSError("hiccup")
        for number in range(2 * NUM_SLOTS):
            with pytest.raises(TransferFailed, match="hiccup"):
                send(channel, header(number, 4), b"data").result(TIMEOUT_S)
        replica.failure = ReplicaLost("the actor died")
        with pytest.raises(ReplicaLost, match="the actor died"):
            send(channel, header(0, 4), b"data").result(TIMEOUT_S)


def test_a_message_that_makes_no_sense_is_refused(replica: PlayedReplica) -> None:
    message: Message = {"kind": "piece", "span": "wide", "nbytes": None}
    assert "refused" in asyncio.run(receive(replica.receivers, message, [0]))


def test_memory_that_cannot_be_had_for_a_channel_leaves_the_way_to_others(replica: PlayedReplica) -> None:
    replica.direct.failures.append(MemoryError("none left"))
    with pytest.raises(TransferFailed, match="none left"):
        replica.open()


def test_where_it_does_not_work_the_configuration_is_at_fault() -> None:
    direct = PlayedDirect()
    direct.failures.append(RuntimeError("UCX found no device"))
    with pytest.raises(ConfigError, match=r"UCX found no device.*transport.kind to auto"):
        NixlWay(CONFIG, direct)


def test_where_it_cannot_be_imported_its_own_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nixl", None)
    with pytest.raises(ConfigError, match=r"transport.kind = nixl does not work here.*import of nixl halted"):
        NixlWay(CONFIG)


@pytest.mark.parametrize("check", [open_nixl, check_nixl])
def test_where_it_is_not_installed_the_remedy_is_named(
    check: Callable[[TransportConfig], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"transport.kind = nixl.*pip install 'ernie-cluster\[nixl\]' on every node"):
        check(CONFIG)
    assert check(TransportConfig()) is None
