"""Two processes joined by (a twin of) NCCL, and what the living one sees when the other is killed at each stage."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from ernie_cluster.errors import ReplicaError, ReplicaLost
from ernie_cluster.transport.base import Payload, PieceHeader
from ernie_cluster.transport.gpu_side import Deadlines, GpuSide
from ernie_cluster.transport.nccl import open_nccl
from tests.unit.transport.conformance import TIMEOUT_S, RecordingSink, seen
from tests.unit.transport.gpu_ends import PATIENT, Plan, new_receiver, push, push_group
from tests.unit.transport.gpu_twin import TwinGpu
from tests.unit.transport.nccl_twin import Mishaps

DYING_PIECE = 66

# one process imports torch, all children are forked from it
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.unit.transport.gpu_ends"])


class DyingSink(RecordingSink):
    def accept(self, header: PieceHeader, payload: Payload) -> None:
        if header.piece == DYING_PIECE:
            os.kill(os.getpid(), signal.SIGKILL)
        super().accept(header, payload)


def give_up(reason: str) -> None:
    """What a real process does, too; nothing here may lead to it."""
    sys.stderr.write(f"given up: {reason}\n")
    os._exit(70)


def new_side(plan: Plan, deadlines: Deadlines = PATIENT) -> GpuSide:
    return GpuSide(TwinGpu(f"gpu-of-{os.getpid()}", Mishaps(plan)), give_up, deadlines)


def receive(pipe: Connection, plan: Plan) -> None:
    """Child: a receiver, until the parent closes the pipe."""
    torch.set_num_threads(1)
    with closing(new_receiver(DyingSink(), new_side(plan))) as receiver:
        pipe.send(receiver.address)
        with suppress(EOFError):
            pipe.recv()


def send_group(pipe: Connection, address: str, plan: Plan) -> None:
    """Child: three pieces in one group, and then whatever the parent wants."""
    torch.set_num_threads(1)
    with closing(open_nccl(address, "to-be-killed", new_side(plan))) as channel:
        for future in push_group(channel, 3):
            future.result(TIMEOUT_S)
        pipe.send("done")
        with suppress(EOFError):
            pipe.recv()


class Child:
    """A process that runs `target(pipe, *args)`; killed at the end if it still lives."""

    def __init__(self, target: Callable[..., None], *args: object) -> None:
        self.pipe, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=target, args=(theirs, *args), daemon=True)
        self.process.start()
        theirs.close()

    def told(self) -> Any:
        assert self.pipe.poll(TIMEOUT_S)
        return self.pipe.recv()

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def close(self) -> None:
        self.pipe.close()
        self.process.join(TIMEOUT_S)
        self.process.kill()
        self.process.join(TIMEOUT_S)
        self.process.close()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On so small tensors more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def side() -> Iterator[GpuSide]:
    """The living process's, with long deadlines: it learns of a death at once, or these tests fail."""
    side = new_side({})
    yield side
    assert not side.gpu.nccl.live


def check_another_receiver_works(side: GpuSide) -> None:
    with closing(Child(receive, {})) as child, closing(open_nccl(child.told(), "prefill-0", side)) as channel:
        for future in push_group(channel, 3):
            future.result(TIMEOUT_S)
        assert sorted(piece[2] for piece in seen(channel)) == [0, 1, 2]


@pytest.mark.parametrize("plan", [{"init": {0: "kill"}}, {"launch": {0: "kill"}}, {"recv": {0: "kill"}}], ids=str)
def test_a_receiver_killed_while_the_way_is_opened(side: GpuSide, plan: Plan) -> None:
    with closing(Child(receive, plan)) as child, pytest.raises(ReplicaLost):
        open_nccl(child.told(), "prefill-0", side)
    check_another_receiver_works(side)


@pytest.mark.parametrize("plan", [{"launch": {1: "kill"}}, {"recv": {1: "kill"}}, {"recv": {2: "kill"}}], ids=str)
def test_a_receiver_killed_while_bytes_are_on_their_way(side: GpuSide, plan: Plan) -> None:
    """Before its group began, and within it."""
    with closing(Child(receive, plan)) as child, closing(open_nccl(child.told(), "prefill-0", side)) as channel:
        for future in push_group(channel, 3):
            with pytest.raises(ReplicaLost, match=r"closed the connection or died|reset"):
                future.result(TIMEOUT_S)
        with pytest.raises(ReplicaLost):
            push(channel, 3).result(TIMEOUT_S)
    check_another_receiver_works(side)


def test_a_receiver_killed_in_its_sink(side: GpuSide) -> None:
    with closing(Child(receive, {})) as child, closing(open_nccl(child.told(), "prefill-0", side)) as channel:
        push(channel, 0).result(TIMEOUT_S)
        call = channel.call({"op": "never"}, TIMEOUT_S)
        with pytest.raises(ReplicaLost):
            push(channel, DYING_PIECE).result(TIMEOUT_S)
        with pytest.raises(ReplicaLost):
            call.result(TIMEOUT_S)


def test_a_receiver_that_stands_still_is_lost_after_the_stall_timeout() -> None:
    side = new_side({}, Deadlines(join_s=TIMEOUT_S, transfer_s=TIMEOUT_S, abort_s=TIMEOUT_S, stall_s=0.3))
    with closing(Child(receive, {})) as child, closing(open_nccl(child.told(), "prefill-0", side)) as channel:
        child.signal(signal.SIGSTOP)
        with pytest.raises(ReplicaLost, match="not acknowledged"):
            push(channel, 0).result(TIMEOUT_S)
        child.signal(signal.SIGKILL)
    assert not side.gpu.nccl.live


@pytest.mark.parametrize(
    "plan",
    [
        {"init": {0: "kill"}},
        {"launch": {0: "kill"}},
        {"send": {0: "kill"}},
        {"launch": {1: "kill"}},
        {"send": {1: "kill"}},
        {"send": {2: "kill"}},
    ],
    ids=str,
)  # fmt: skip
def test_a_killed_sender_is_reported_and_the_next_one_is_served(side: GpuSide, plan: Plan) -> None:
    sink = RecordingSink()
    with closing(new_receiver(sink, side)) as receiver:
        with closing(Child(send_group, receiver.address, plan)):
            assert sink.one_is_gone.wait(TIMEOUT_S)
        assert sink.gone == ["to-be-killed"]
        assert not sink.pieces  # of a group that broke nothing is used
        with closing(Child(send_group, receiver.address, {})) as another:
            assert another.told() == "done"
        assert sorted(piece[2] for piece in sink.pieces) == [0, 1, 2]  # type: ignore[index, type-var]


def test_two_processes_that_send_to_each_other_at_once_do_not_wait_in_a_circle(side: GpuSide) -> None:
    sink = RecordingSink()
    with closing(new_receiver(sink, side)) as receiver, closing(Child(receive, {})) as child:
        address = child.told()
        with closing(Child(send_group, receiver.address, {})) as other, closing(open_nccl(address, "me", side)) as mine:
            futures = [push(mine, piece, 100_000) for piece in range(20)]
            assert other.told() == "done"
            for future in futures:
                try:
                    future.result(TIMEOUT_S)
                except ReplicaError as e:
                    pytest.fail(f"a piece did not arrive: {e}")
            assert len(seen(mine)) == 20
