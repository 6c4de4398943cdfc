"""Transports through Ray, the object store's and NIXL's, between two real actors: their laws, and either end killed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, closing
from importlib.util import find_spec
from typing import Any

import pytest
import ray
import ray.exceptions

from ernie_cluster.actors.channels import Channels, Receivers, open_nixl, receive
from ernie_cluster.actors.environment import local_cluster
from ernie_cluster.actors.messages import NAMESPACE
from ernie_cluster.config.transport import TransportConfig
from ernie_cluster.errors import ReplicaLost
from ernie_cluster.transport.base import Channel, Message
from ernie_cluster.transport.choose import Endpoint
from tests.unit.transport.conformance import TIMEOUT_S, Connect, RecordingSink, TransportLaws, header, send

PIECE_BYTES = 1 << 20
OBJECT_STORE = TransportConfig(kind="object_store")
NIXL = TransportConfig(kind="nixl", piece_bytes=PIECE_BYTES, staging_bytes=16 * PIECE_BYTES)
no_nixl = pytest.mark.skipif(find_spec("nixl") is None, reason="nixl is not installed, see the extra of that name")
NUM_PIECES = 40
START_TIMEOUT_S = 120.0


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # no token file in the home of whoever runs the tests
        with local_cluster():
            ray.init("local", num_cpus=2, namespace=NAMESPACE, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture(scope="module", params=[OBJECT_STORE, pytest.param(NIXL, marks=no_nixl)], ids=lambda way: way.kind)
def way(request: pytest.FixtureRequest) -> TransportConfig:
    return request.param  # type: ignore[no-any-return]


def make_channels(way: TransportConfig) -> Callable[[], Channels]:
    """For a sender in this process, which has one `NixlWay`."""
    nixl = open_nixl(way)
    me = Endpoint("here", None, "prefill-0", has_nixl=nixl is not None)
    return lambda: Channels(me, way.kind, nixl=nixl)


@pytest.fixture(scope="module")
def new_channels(way: TransportConfig) -> Callable[[], Channels]:
    return make_channels(way)


class Taker:
    """A replica that takes pieces, and counts them."""

    def __init__(self, name: str, way: TransportConfig) -> None:
        self.sink = RecordingSink()
        self.receivers = Receivers(self.sink, name, OBJECT_STORE, nixl=open_nixl(way))

    async def endpoint(self) -> Endpoint:
        return self.receivers.endpoint

    async def deliver(self, message: Message, refs: list[Any]) -> Message:
        return await receive(self.receivers, message, refs)

    async def num_pieces(self) -> int:
        return len(self.sink.pieces)


class Giver:
    """A replica that keeps a channel full until it is killed."""

    async def give(self, peer: Endpoint, way: TransportConfig) -> None:
        channel = make_channels(way)().to(peer)
        for piece in range(1_000_000):
            send(channel, header(piece, PIECE_BYTES), bytes(PIECE_BYTES)).result(TIMEOUT_S)


_takers: list[Any] = []


def start(name: str, way: TransportConfig) -> tuple[Any, Endpoint]:
    """A taker, which lives until the module's end, and its endpoint."""
    taker = (
        ray.remote(Taker)
        .options(name=f"{name}-{way.kind}", num_cpus=0, max_concurrency=8)
        .remote(f"{name}-{way.kind}", way)
    )
    _takers.append(taker)  # an actor ends with its last handle
    return taker, ray.get(taker.endpoint.remote(), timeout=START_TIMEOUT_S)


@pytest.fixture(scope="module")
def peer(way: TransportConfig) -> Endpoint:
    """Of a replica that lives as long as the module."""
    return start("decode-laws", way)[1]


def test_the_way_that_is_wished_for_is_the_one_that_is_taken(
    peer: Endpoint, channels: Channels, way: TransportConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        exchange(channels.to(peer))
    assert f"channel to {peer.actor_name}: {way.kind}, because " in caplog.text
    assert f"transport.kind = {way.kind} asks for it" in caplog.text


class TestBetweenTwoActors(TransportLaws):
    @pytest.fixture
    def connect(self, peer: Endpoint, new_channels: Callable[[], Channels]) -> Iterator[Connect]:
        with ExitStack() as stack:
            channels = stack.enter_context(closing(new_channels()))
            channels.to(peer).call({"op": "seen"}, TIMEOUT_S).result(TIMEOUT_S)  # what an earlier test has sent
            yield lambda: stack.enter_context(closing(new_channels())).to(peer)


@pytest.fixture
def channels(new_channels: Callable[[], Channels]) -> Iterator[Channels]:
    with closing(new_channels()) as channels:
        yield channels


def exchange(channel: Channel) -> None:
    """A piece that arrives."""
    send(channel, header(0, PIECE_BYTES), bytes(PIECE_BYTES)).result(TIMEOUT_S)


def test_a_killed_receiver_fails_all_that_is_on_its_way_and_its_successor_is_found(
    channels: Channels, way: TransportConfig
) -> None:
    taker, peer = start("decode-0", way)
    channel = channels.to(peer)
    exchange(channel)
    sent: list[Future[None]] = [
        send(channel, header(piece, PIECE_BYTES), bytes(PIECE_BYTES)) for piece in range(1, NUM_PIECES)
    ]
    ray.kill(taker)
    ends = [future.exception(TIMEOUT_S) for future in sent]
    assert isinstance(ends[-1], ReplicaLost), ends[-1]
    with pytest.raises(ReplicaLost):
        channel.call({}, TIMEOUT_S).result(TIMEOUT_S)

    start("decode-0", way)  # the same name, another process
    exchange(channels.to(peer))


def test_a_killed_sender_keeps_nobody_from_the_receiver(channels: Channels, way: TransportConfig) -> None:
    taker, peer = start("decode-1", way)
    giver = ray.remote(Giver).options(num_cpus=0).remote()
    giving = giver.give.remote(peer, way)
    while ray.get(taker.num_pieces.remote(), timeout=TIMEOUT_S) == 0:
        pass
    ray.kill(giver)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(giving, timeout=TIMEOUT_S)
    exchange(channels.to(peer))
