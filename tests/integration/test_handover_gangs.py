"""A prefill gang of two processes, each with its own KV heads, and a decode replica: by shared memory, and with a death."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

import pytest
import torch

from ernie_cluster.config.model import ModelConfig
from ernie_cluster.config.parallel import ParallelDims, Shard
from ernie_cluster.engine.follower import Follower
from ernie_cluster.engine.handover import Peers
from ernie_cluster.engine.runner import Runner
from ernie_cluster.engine.slices import SliceOf
from ernie_cluster.engine.worker import Worker
from ernie_cluster.model.group import Group, join, open_store
from ernie_cluster.request import GenerationRequest
from ernie_cluster.transport.base import Message, Payload, PieceHeader, Reply, Sink
from ernie_cluster.transport.choose import Endpoint
from ernie_cluster.transport.shared_memory import SharedMemoryChannel, SharedMemoryReceiver
from tests import tiny
from tests.unit.engine.test_laws import answers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memfd and abstract sockets are Linux's")

PATIENCE_S = 100.0
SETTINGS: dict[str, object] = {"piece_bytes": 1024, "max_batch_tokens": 16, "lease_timeout_s": PATIENCE_S}


# ---- in the children


def rank_main(folder: str, rank: int, line: Connection) -> None:
    torch.set_num_threads(1)
    store = None
    if rank == 0:
        store = open_store("127.0.0.1", PATIENCE_S)
        line.send(store.port)
    shard = Shard(ParallelDims(2, 1), rank)
    place = join(store or ("127.0.0.1", line.recv()), shard, tiny.CPU, PATIENCE_S)
    config = ModelConfig.from_folder(folder)
    runner = Runner.load(
        folder, config, "prefill", dtype="float32", device=tiny.CPU, num_blocks=64, block_size=4, place=place,
        shares_kv=False,
    )  # fmt: skip
    if rank == 0:
        lead(runner, config, line)
    else:
        follow(runner, place.tp, config, line)


def lead(runner: Runner, config: ModelConfig, line: Connection) -> None:
    outcomes = tiny.Outcomes()
    worker = Worker(runner, config, tiny.make_worker("prefill", **SETTINGS)[0].settings, outcomes)  # type: ignore[arg-type]
    with closing(SharedMemoryChannel(line.recv(), "leader")) as orders:
        worker.lead([orders])
        worker.start()
        address: str = line.recv()
        with closing(SharedMemoryChannel(address, "prefill/0")) as channel:
            request: GenerationRequest = line.recv()
            worker.open_prefill(request, 0, channel, Peers((Endpoint("here", address, "decode"),)))
            if line.recv() == "its failure":
                outcomes.wait_for(["a"], PATIENCE_S)
            worker.stop()
            outcomes.drain()
            line.send((outcomes.tokens, {key: type(error).__name__ for key, error in outcomes.errors.items()}))


def follow(runner: Runner, tp: Group, config: ModelConfig, line: Connection) -> None:
    def connect(peer: Endpoint) -> SharedMemoryChannel:
        assert peer.shm_address is not None
        return SharedMemoryChannel(peer.shm_address, "prefill/1")

    follower = Follower(runner.kv, SliceOf(config.text.num_kv_heads, 1, 2), 1024, connect)
    with closing(SharedMemoryReceiver(follower, 1 << 20)) as receiver:
        line.send(receiver.address)
        runner.follow(tp, follower.noted)


# ---- in the parent


class Gang:
    """Both ranks."""

    def __init__(self) -> None:
        context = get_context("spawn")
        self.lines: list[Connection] = []
        self.processes: list[SpawnProcess] = []
        for rank in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=rank_main, args=(tiny.tiny_folder(), rank, theirs), daemon=True)
            process.start()
            self.lines.append(ours)
            self.processes.append(process)
        self.lines[1].send(self.hear(0))
        self.lines[0].send(self.hear(1))

    def hear(self, rank: int) -> Any:
        assert self.lines[rank].poll(PATIENCE_S), f"rank {rank} does not answer"
        return self.lines[rank].recv()

    def kill(self, rank: int) -> None:
        """SIGKILL."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join(PATIENCE_S)


class Watched:
    """A sink that says whose pieces come."""

    def __init__(self, sink: Sink, came: Callable[[int], None]) -> None:
        self._sink, self._came = sink, came

    def accept(self, header: PieceHeader, payload: Payload) -> None:
        self._sink.accept(header, payload)
        self._came(header.piece % 2)  # numbers of two senders take turns

    def handle(self, message: Message, reply: Reply) -> None:
        self._sink.handle(message, reply)

    def disconnected(self, peer: str) -> None:
        self._sink.disconnected(peer)


@pytest.fixture
def gang() -> Iterator[Gang]:
    with closing(Gang()) as gang:
        yield gang


@pytest.fixture
def request_of_many_blocks() -> GenerationRequest:
    return tiny.make_request(range(200, 260), "a", max_tokens=10)


def test_two_processes_hand_over_to_one(gang: Gang, request_of_many_blocks: GenerationRequest) -> None:
    request = request_of_many_blocks
    senders: list[int] = []
    worker, outcomes = tiny.make_worker("decode", **SETTINGS)  # type: ignore[arg-type]
    with closing(SharedMemoryReceiver(Watched(worker.inbox, senders.append), 1 << 20)) as receiver:
        worker.start()
        outcomes.tokens["a"] = [-1]
        worker.open_decode(request, 0)
        gang.lines[0].send(receiver.address)
        gang.lines[0].send(request)
        outcomes.wait_for(["a"], PATIENCE_S)
        assert not outcomes.errors
        gang.lines[0].send("its tokens")
        tokens, errors = gang.hear(0)
        assert errors == {}
        assert tokens["a"] + outcomes.tokens["a"][1:] == answers(*tiny.make_worker(), [request])["a"]
    assert senders.count(0) == senders.count(1) > 0
    worker.stop()
    assert worker.check()
    assert worker.pool.num_used == 0


def test_when_one_of_them_is_killed_the_attempt_fails_on_both_sides(
    gang: Gang, request_of_many_blocks: GenerationRequest
) -> None:
    request = request_of_many_blocks
    worker, _ = tiny.make_worker("decode", **SETTINGS)  # type: ignore[arg-type]

    def came(sender: int) -> None:
        if sender == 1:
            gang.kill(1)

    with closing(SharedMemoryReceiver(Watched(worker.inbox, came), 1 << 20)) as receiver:
        worker.start()
        worker.open_decode(request, 0)
        gang.lines[0].send(receiver.address)
        gang.lines[0].send(request)
        gang.lines[0].send("its failure")
        _, errors = gang.hear(0)
        assert errors == {"a": "EngineFailed"}
        assert worker.snapshot().num_leases == 1
        assert worker.abort("a")
    worker.stop()
    assert worker.failure is None
    assert worker.check()
    assert worker.pool.num_used == 0
