"""Replicas whose ranks are threads, on the tiny model, and the network between all ranks."""

from __future__ import annotations

import functools
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing

import pytest
import torch

from ernie_cluster.config.parallel import ParallelDims, Shard
from ernie_cluster.engine.follower import Follower
from ernie_cluster.engine.handover import Peers
from ernie_cluster.engine.host_tier import HostMemory
from ernie_cluster.engine.runner import Runner
from ernie_cluster.engine.slices import SliceOf
from ernie_cluster.engine.worker import Worker
from ernie_cluster.model.build import Role, build_decoder
from ernie_cluster.model.checkpoint import Checkpoint
from ernie_cluster.model.decoder import Decoder
from ernie_cluster.model.group import Place
from ernie_cluster.model.weights import load_decoder
from ernie_cluster.request import GenerationRequest
from ernie_cluster.transport.base import Channel, Sink
from ernie_cluster.transport.choose import Endpoint
from ernie_cluster.transport.gpu_receiver import GpuReceiver
from ernie_cluster.transport.gpu_side import Deadlines, GpuSide
from ernie_cluster.transport.ipc import open_ipc
from ernie_cluster.transport.local import Faults, LocalChannel, LocalReceiver
from ernie_cluster.transport.nccl import open_nccl
from ernie_cluster.transport.shared_memory import SharedMemoryChannel, SharedMemoryReceiver
from tests import tiny
from tests.groups import together
from tests.unit.transport.gpu_ends import PATIENT, new_receiver
from tests.unit.transport.gpu_twin import TwinGpu
from tests.unit.transport.nccl_twin import Mishaps

PATIENCE_S = 60.0


class Network:
    """Joins ranks by their names; made with the way that KV takes, while orders always go inside the process.

    Args:
        kind: local (the object store's), shared_memory, nccl or ipc (between twins of GPUs).
        deadlines: of GPUs.
        stall_s: how long a local way waits for an acknowledgement.
    """

    def __init__(self, kind: str = "local", *, deadlines: Deadlines = PATIENT, stall_s: float = PATIENCE_S) -> None:
        self.kind, self.deadlines, self._stall_s = kind, deadlines, stall_s
        self.faults: dict[tuple[str, str], Faults] = {}
        """What befalls KV on its way, by sender and receiver."""
        self.mishaps: dict[str, Mishaps] = {}
        """What befalls a rank's GPU."""
        self.receivers: dict[str, LocalReceiver] = {}
        self._ways: dict[str, SharedMemoryReceiver | GpuReceiver] = {}
        self._sides: dict[str, GpuSide] = {}
        self._open: dict[tuple[str, str], Channel] = {}
        self._stack = ExitStack()
        self._lock = threading.Lock()

    def listen(self, name: str, sink: Sink) -> None:
        """A rank can be reached."""
        self.receivers[name] = LocalReceiver(sink)
        if self.kind == "shared_memory":
            self._ways[name] = self._stack.enter_context(closing(SharedMemoryReceiver(sink, 1 << 20)))
        elif self.kind in ("nccl", "ipc"):
            gpu = TwinGpu(name, self.mishaps.get(name))
            self._sides[name] = GpuSide(gpu, pytest.fail, self.deadlines)
            self._ways[name] = self._stack.enter_context(closing(new_receiver(sink, self._sides[name])))

    def order(self, sender: str, receiver: str) -> Channel:
        """A way for a leader's orders."""
        return self._stack.enter_context(closing(LocalChannel(self.receivers[receiver], sender)))

    def to(self, sender: str, receiver: str) -> Channel:
        """The way for KV between two ranks, made when they first meet."""
        with self._lock:
            known = self._open.get((sender, receiver))
            if known is None:
                known = self._open[sender, receiver] = self._stack.enter_context(closing(self._make(sender, receiver)))
            return known

    def part(self, sender: str, receiver: str) -> None:
        """The next time these two meet they find a new way."""
        self._open.pop((sender, receiver))

    @property
    def pairs(self) -> set[tuple[str, str]]:
        """Ranks that have met."""
        return set(self._open)

    def close(self) -> None:
        self._stack.close()

    def _make(self, sender: str, receiver: str) -> Channel:
        way = self._ways.get(receiver)
        if isinstance(way, SharedMemoryReceiver):
            return SharedMemoryChannel(way.address, sender)
        if isinstance(way, GpuReceiver):
            return (open_nccl if self.kind == "nccl" else open_ipc)(way.address, sender, self._sides[sender])
        faults = self.faults.get((sender, receiver))
        return LocalChannel(self.receivers[receiver], sender, faults, stall_timeout_s=self._stall_s)


class Gang:
    """A running replica.

    Args:
        stack: ends it.
        role: which weights it has, and its name; its ranks have their number behind.
        tp: its ranks.
        network: where they can be reached.
        shares_kv: whether they have one KV cache.
        kv_dtype: see `EngineConfig`.
        settings: of the worker.
    """

    def __init__(
        self,
        stack: ExitStack,
        role: Role,
        tp: int,
        network: Network,
        *,
        shares_kv: bool = False,
        kv_dtype: str = "auto",
        **settings: object,
    ) -> None:
        self.network = network
        self._role, self._shares_kv, self._kv_dtype = role, shares_kv, kv_dtype
        pattern, self.outcomes = tiny.make_worker(role, **settings)  # type: ignore[arg-type]
        self._settings, self._num_blocks = pattern.settings, pattern.pool.num_blocks
        self.kv_ranks = [f"{role}/{rank}" for rank in range(1 if shares_kv else tp)]
        """Names of those that KV goes to."""
        self.followers: dict[int, Follower] = {}
        self._met = threading.Barrier(tp, timeout=PATIENCE_S)
        self._leads: Future[Worker] = Future()
        self._pool = ThreadPoolExecutor(1)
        self._end = self._pool.submit(together, self._run, ParallelDims(tp, 1))
        self._end.add_done_callback(self._tell)
        self.worker = self._leads.result(PATIENCE_S)
        stack.callback(self._stop)

    def open_prefill(self, request: GenerationRequest, epoch: int, to: Gang) -> None:
        """Compute a prompt here and hand it over, as an actor would have it done."""
        self.worker.open_prefill(request, epoch, *self._way(to))

    def lend(self, request: GenerationRequest, epoch: int, to: Gang) -> None:
        """Send what is cached here of a prompt."""
        self.worker.lend(request, epoch, 1000, *self._way(to))

    def _way(self, to: Gang) -> tuple[Channel, Peers]:
        targets = self.worker.sender.targets(len(to.kv_ranks))
        endpoints = tuple(Endpoint("here", None, name) for name in to.kv_ranks)
        first, *others = [self.network.to(f"{self._role}/0", to.kv_ranks[rank]) for rank in (0, *targets)]
        return first, Peers(endpoints, dict(zip(targets, others, strict=True)))

    def _stop(self) -> None:
        self.worker.stop()
        self._end.result(PATIENCE_S)
        self._pool.shutdown()

    def _run(self, place: Place) -> None:
        torch.set_num_threads(1)
        rank, config = place.shard.tp_rank, tiny.tiny_config()
        with _loading:
            decoder = _decoder(self._role, place.shard, self._kv_dtype)
        decoder.connect(place)
        size = self._num_blocks, tiny.BLOCK_SIZE
        runner = Runner.around(decoder, num_blocks=size[0], block_size=size[1], place=place, shares_kv=self._shares_kv)
        name = f"{self._role}/{rank}"
        if rank == 0:
            worker = Worker(runner, config, self._settings, self.outcomes, tiny.tiny_compiler)
            self.network.listen(name, worker.inbox)
            self._met.wait()
            worker.lead([self.network.order(name, other) for other in self.kv_ranks[1:]])
            worker.start()
            self._leads.set_result(worker)
        elif self._shares_kv:
            self._met.wait()
            runner.follow(place.tp)
        else:
            part = SliceOf(config.text.num_kv_heads, rank, place.tp.size)
            follower = Follower(
                runner.kv,
                part,
                self._settings.piece_bytes,
                lambda to: self.network.to(name, to.actor_name),
                HostMemory(runner.kv.data, self._settings.host_blocks) if self._settings.host_blocks else None,
            )
            self.followers[rank] = follower
            self.network.listen(name, follower)
            self._met.wait()
            runner.follow(place.tp, follower.noted)

    def _tell(self, end: Future[list[None]]) -> None:
        error = end.exception()
        if error is not None and not self._leads.done():
            self._leads.set_exception(error)


@functools.cache
def _decoder(role: Role, shard: Shard, kv_dtype: str) -> Decoder:
    """A rank's; used by one gang at a time, since a role is played once at a time."""
    config = tiny.tiny_config()
    decoder = build_decoder(config, role, dtype=torch.float32, device=tiny.CPU, shard=shard, kv_dtype=kv_dtype)
    with Checkpoint(tiny.tiny_folder()) as checkpoint:
        load_decoder(decoder, config, checkpoint, has_vision_experts=role != "decode")
    return decoder


_loading = threading.Lock()
