"""Channels are made once per peer, and again after a peer was lost."""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from ernie_cluster.actors import channels as module
from ernie_cluster.actors.channels import Channels, Receivers
from ernie_cluster.config.transport import TransportConfig
from ernie_cluster.errors import ReplicaLost, TransferFailed
from ernie_cluster.transport.base import Channel, Message, Pack, PieceHeader
from ernie_cluster.transport.choose import Choice, Endpoint, GpuEndpoint
from tests.unit.transport.conformance import RecordingSink

ME, PEER, OTHER = (Endpoint("host", f"shm:{name}:secret", name) for name in ("me", "peer", "other"))


class PlayedChannel:
    """Every call fails with `error`, if it has one."""

    max_piece_bytes = 1

    def __init__(self, error: Exception | None) -> None:
        self._error = error
        self.is_closed = False

    def push(self, header: PieceHeader, pack: Pack) -> Future[None]:
        raise AssertionError("nothing is pushed here")

    def call(self, message: Message, timeout_s: float) -> Future[Message]:
        answer: Future[Message] = Future()
        if self._error is None:
            answer.set_result({})
        else:
            answer.set_exception(self._error)
        return answer

    def close(self) -> None:
        self.is_closed = True


class PlayedChannels(Channels):
    def __init__(self, error: Exception | None = None, me: Endpoint = ME) -> None:
        super().__init__(me)
        self._error = error
        self.made: list[PlayedChannel] = []
        self.door = threading.Event()
        self.door.set()

    def _make(self, choice: Choice, peer: Endpoint) -> Channel:
        self.door.wait(10)
        self.made.append(PlayedChannel(self._error))
        return self.made[-1]


def test_requests_that_meet_a_peer_first_at_the_same_time_share_one_channel() -> None:
    channels = PlayedChannels()
    channels.door.clear()
    with ThreadPoolExecutor(8) as pool:
        found = [pool.submit(channels.to, PEER) for _ in range(8)]
        channels.door.set()
        assert len({id(f.result(10)) for f in found}) == 1
    assert len(channels.made) == 1


@pytest.mark.parametrize(("error", "num_made"), [(None, 1), (TransferFailed("once"), 1), (ReplicaLost("gone"), 2)])
def test_only_a_lost_channel_is_made_anew(error: Exception | None, num_made: int) -> None:
    channels = PlayedChannels(error)
    channels.to(PEER).call({}, 1.0)
    channels.to(PEER)
    assert len(channels.made) == num_made
    assert [c.is_closed for c in channels.made] == [True] * (num_made - 1) + [False]


def test_close_closes_all() -> None:
    channels = PlayedChannels()
    channels.to(PEER)
    channels.to(OTHER)
    channels.close()
    assert [c.is_closed for c in channels.made] == [True, True]


GPU_ME = Endpoint("host", None, "me", GpuEndpoint("GPU-1", "gpu:h:1:t"))
GPU_PEER = Endpoint("host", "shm:peer:secret", "peer", GpuEndpoint("GPU-2", "gpu:h:2:t"))


@pytest.mark.parametrize("error", [TransferFailed("no peer access"), ReplicaLost("a port is closed")])
def test_what_is_wrong_between_two_gpus_leaves_the_host_s_ways(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    tried: list[str] = []

    class Fallible(PlayedChannels):
        def _make(self, choice: Choice, peer: Endpoint) -> Channel:
            tried.append(choice.kind)
            if choice.kind in ("ipc", "nccl"):
                raise error
            return super()._make(choice, peer)

    channels = Fallible(me=GPU_ME)
    with caplog.at_level(logging.INFO):
        channels.to(GPU_PEER)
    assert tried == ["ipc", "nccl", "shared_memory"]
    assert f"no channel to peer by ipc: {error}" in caplog.text
    assert "channel to peer: shared_memory, because me and peer are on the same host" in caplog.text


def test_a_channel_that_is_made_while_all_are_closed_is_closed_too() -> None:
    channels = PlayedChannels()
    channels.door.clear()
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(channels.to, PEER)
        channels.close()
        channels.door.set()
        with pytest.raises(ReplicaLost, match="closing"):
            late.result(10)
    assert [c.is_closed for c in channels.made] == [True]


def test_bytes_that_do_not_come_are_refused_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network between two nodes may be down while both live; a call that waited for ever would hold its thread's place."""
    monkeypatch.setattr(module, "STALL_TIMEOUT_S", 0.01)
    receivers = Receivers(RecordingSink(), "me", TransportConfig(kind="object_store"))

    async def scene() -> Message:
        return await module.receive(receivers, {"kind": "piece"}, [asyncio.get_running_loop().create_future()])

    try:
        answer = asyncio.run(asyncio.wait_for(scene(), 10))
    finally:
        receivers.close()
    assert answer == {"refused": "what was announced did not come within 0.01 s"}
