"""Channels from one replica to others: the right transport for each, opened on demand and kept."""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import Future
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from numpy.typing import NDArray

from ernie_cluster.actors.links import translate
from ernie_cluster.actors.messages import NAMESPACE
from ernie_cluster.config.transport import TransportConfig
from ernie_cluster.errors import ConfigError, ReplicaError, ReplicaLost
from ernie_cluster.faults import Faults
from ernie_cluster.transport.base import STALL_TIMEOUT_S, Channel, Message, Pack, PieceHeader, Sink
from ernie_cluster.transport.choose import Choice, Endpoint, Wish, choices
from ernie_cluster.transport.faulty import FaultyChannel, FaultySink
from ernie_cluster.transport.object_store import ObjectStoreChannel, ObjectStoreReceiver
from ernie_cluster.transport.shared_memory import SharedMemoryChannel, SharedMemoryReceiver
from ernie_cluster.transport.staging import host_id

if TYPE_CHECKING:
    import torch

    from ernie_cluster.actors.gpu_ways import GpuWays
    from ernie_cluster.actors.nixl_way import NixlWay

log = logging.getLogger(__name__)


class Receivers:
    """The ways into one replica: its GPU if it has one, shared memory where the host has it, the object store always.

    Args:
        gpu: closed with the others.
        nixl: likewise.
        faults: of this process, if there are to be any.
    """

    def __init__(
        self,
        sink: Sink,
        actor_name: str,
        config: TransportConfig,
        gpu: GpuWays | None = None,
        nixl: NixlWay | None = None,
        faults: Faults | None = None,
    ) -> None:
        self._gpu, self.nixl, self._wish, self._faults = gpu, nixl, config.kind, faults
        sink = sink if faults is None else FaultySink(sink, faults)
        self.object_store = ObjectStoreReceiver(sink, actor_name)
        self._shared: SharedMemoryReceiver | None = None
        if config.kind != "object_store":
            try:
                self._shared = SharedMemoryReceiver(sink, config.staging_bytes)
            except OSError as e:  # not Linux, or no memory for it
                log.warning("no shared memory here (%s); KV goes through the object store", e)
        address = self._shared.address if self._shared else None
        self.endpoint = Endpoint(host_id(), address, actor_name, gpu.endpoint if gpu else None, nixl is not None)

    def channels(self) -> Channels:
        """The ways out of the same replica; to be closed before these."""
        return Channels(self.endpoint, self._wish, self._gpu, self.nixl, self._faults)

    def close(self) -> None:
        if self._gpu is not None:
            self._gpu.close()
        if self._shared is not None:
            self._shared.close()
        self.object_store.close()
        if self.nixl is not None:
            self.nixl.close()


class _Watched:
    """A `Channel` that remembers when a call found its peer lost. Every hand-over makes calls, so one is enough."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.is_lost = False

    @property
    def max_piece_bytes(self) -> int:
        return self._channel.max_piece_bytes

    def push(self, header: PieceHeader, pack: Pack) -> Future[None]:
        return self._channel.push(header, pack)

    def call(self, message: Message, timeout_s: float) -> Future[Message]:
        answer = self._channel.call(message, timeout_s)
        answer.add_done_callback(self._look_at)
        return answer

    def close(self) -> None:
        self._channel.close()

    def _look_at(self, answer: Future[Message]) -> None:
        self.is_lost |= not answer.cancelled() and isinstance(answer.exception(), ReplicaLost)


class Channels:
    """Owns the outgoing channels of one replica; safe to use from any thread.

    Args:
        me: this replica.
        wish: of the configuration.
        gpu: this replica's, if it has one.
        nixl: likewise.
        faults: of this process, if there are to be any.
    """

    def __init__(
        self,
        me: Endpoint,
        wish: Wish = "auto",
        gpu: GpuWays | None = None,
        nixl: NixlWay | None = None,
        faults: Faults | None = None,
    ) -> None:
        self._me, self._wish, self._gpu, self._nixl, self._faults = me, wish, gpu, nixl, faults
        self._open: dict[Endpoint, _Watched] = {}
        self._making: dict[Endpoint, threading.Lock] = {}
        self._is_closed = False
        self._lock = threading.Lock()

    def to(self, peer: Endpoint) -> Channel:
        """The channel to a peer; made when the two first meet, and again after it was lost.

        Raises:
            ReplicaLost: the peer cannot be reached.
            TransferFailed: it refuses.
        """
        with self._lock:
            lost = [p for p, channel in self._open.items() if channel.is_lost]
            old = [self._open.pop(p) for p in lost]
            making = self._making.setdefault(peer, threading.Lock())
        for channel in old:
            channel.close()
        with making:  # one peer that is slow to answer keeps nobody from the others
            known = self._open.get(peer)
            if known is not None:
                return known
            made = _Watched(self._make_best(peer))
            with self._lock:
                if not self._is_closed:
                    self._open[peer] = made
                    return made
        made.close()
        raise ReplicaLost("this replica is closing")

    async def reach(self, peer: Endpoint) -> Channel:
        """`to`, on an event loop: at once when the channel is there, else connecting in a thread."""
        known = self._open.get(peer)
        return known if known is not None and not known.is_lost else await asyncio.to_thread(self.to, peer)

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            channels = list(self._open.values())
            self._open.clear()
        for channel in channels:
            channel.close()

    def _make_best(self, peer: Endpoint) -> Channel:
        """The first choice that can be opened; what is wrong with a special way need not keep bytes from the plain ones."""
        for choice in choices(self._me, peer, self._wish):
            try:
                channel = self._make(choice, peer)
            except ReplicaError as e:
                if choice.kind not in ("ipc", "nccl", "nixl"):
                    raise
                log.warning("no channel to %s by %s: %s", peer.actor_name, choice.kind, e)
            else:
                log.info("channel to %s: %s, because %s", peer.actor_name, choice.kind, choice.reason)
                return channel if self._faults is None else FaultyChannel(channel, self._faults)
        raise AssertionError("the object store is always a choice")

    def _make(self, choice: Choice, peer: Endpoint) -> Channel:
        if choice.kind == "shared_memory":
            assert peer.shm_address is not None
            return SharedMemoryChannel(peer.shm_address, peer.actor_name)
        if choice.kind in ("ipc", "nccl"):
            assert self._gpu is not None
            assert peer.gpu is not None
            assert peer.gpu.address is not None
            return self._gpu.open(choice.kind, peer.gpu.address, self._me.actor_name)
        try:
            actor = ray.get_actor(peer.actor_name, NAMESPACE)
        except ValueError:
            raise ReplicaLost(f"{peer.actor_name} is not there") from None

        def deliver(message: Message, refs: list[Any]) -> Future[Message]:
            return _translated(actor.deliver.remote(message, refs).future(), peer.actor_name)

        if choice.kind == "nixl":
            assert self._nixl is not None
            return self._nixl.open(deliver, self._me.actor_name)
        return ObjectStoreChannel(ray.put, deliver, self._me.actor_name)


async def receive(receivers: Receivers, message: Message, refs: list[Any]) -> Message:
    """Body of an actor's `deliver` method: fetch the payload, if any, and hand both to the receiver.

    What a sender has announced and cannot give, for the network between the two nodes is down, is refused: it has given up
    by then, too.
    """
    if receivers.nixl is not None and "span" in message:
        return await receivers.nixl.receive(receivers.object_store, message, refs[0])
    payload: NDArray[np.uint8] | None = None
    try:
        async with asyncio.timeout(STALL_TIMEOUT_S):
            payload = await refs[0] if refs else None
    except TimeoutError:
        return {"refused": f"what was announced did not come within {STALL_TIMEOUT_S:g} s"}
    answer = await asyncio.to_thread(receivers.object_store.receive, message, payload)
    return await asyncio.wrap_future(answer)


def _translated(delivery: Future[Message], where: str) -> Future[Message]:
    """The same with errors of our tree, above all ReplicaLost for an actor that is dead."""
    answer: Future[Message] = Future()

    def settle(done: Future[Message]) -> None:
        error = done.exception()
        if error is None:
            answer.set_result(done.result())
        else:
            answer.set_exception(translate(error, where))

    delivery.add_done_callback(settle)
    return answer


def open_gpu(sink: Sink, device: torch.device, config: TransportConfig) -> GpuWays | None:
    """The way between GPUs of a rank whose model is on `device`; None on the CPU, or where it is not wanted."""
    if device.type != "cuda" or config.kind in ("shared_memory", "object_store"):
        return None
    from ernie_cluster.actors.gpu_ways import GpuWays  # torch, which the conductor need not import

    return GpuWays(sink, device, ray.util.get_node_ip_address(), config)


def check_nixl(config: TransportConfig) -> None:
    """Loads nothing; raises ConfigError where NIXL is wished for and not installed on this machine."""
    if config.kind == "nixl" and find_spec("nixl") is None:
        raise ConfigError(
            "transport.kind = nixl, and nixl is not installed here: pip install 'ernie-cluster[nixl]' on every node, or "
            "set transport.kind to auto"
        )


def open_nixl(config: TransportConfig) -> NixlWay | None:
    """The way by NIXL of a rank, where it is wished for; raises ConfigError where it cannot be."""
    if config.kind != "nixl":
        return None
    check_nixl(config)
    from ernie_cluster.actors.nixl_way import NixlWay  # torch, which the conductor need not import

    return NixlWay(config)
