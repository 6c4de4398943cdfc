"""The transports between GPUs on twins of the GPU in one process: their laws, and what goes wrong with the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest

from ernie_cluster.errors import ReplicaError, ReplicaLost, TransferFailed
from ernie_cluster.transport.gpu import Region
from ernie_cluster.transport.gpu_channel import Batch
from ernie_cluster.transport.gpu_side import Deadlines, Steps, Turns
from ernie_cluster.transport.link import Link
from ernie_cluster.transport.nccl import open_nccl
from tests.unit.transport.conformance import REFUSED_EPOCH, TIMEOUT_S, Connect, TransportLaws, header, seen, send
from tests.unit.transport.gpu_ends import STAGING_BYTES, Ends, Plan, push, push_group, push_until_it_works

SOON_S = 0.2


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


class TestNcclLaws(TransportLaws):
    @pytest.fixture
    def connect(self, stack: ExitStack) -> Connect:
        return Ends(stack).connect


class TestIpcLaws(TransportLaws):
    @pytest.fixture
    def connect(self, stack: ExitStack) -> Connect:
        return Ends(stack, "ipc").connect


SHORT = Deadlines(join_s=TIMEOUT_S, transfer_s=SOON_S, abort_s=TIMEOUT_S, stall_s=TIMEOUT_S)
"""For what begins and does not end."""


@pytest.mark.parametrize(
    ("sender_plan", "receiver_plan", "reason"),
    [
        ({"send": {2: "hang"}}, {}, "took more than"),
        ({}, {"recv": {2: "hang"}}, "took more than"),
        ({"launch": {1: "hang"}}, {}, "took more than"),
        ({}, {"launch": {1: "hang"}}, "took more than"),
        ({"launch": {1: "raise"}}, {}, "NCCL says launch failed"),
        ({}, {"launch": {1: "raise"}}, "NCCL says launch failed"),
        ({"send": {1: "raise"}}, {}, "NCCL says send failed"),
        ({}, {"recv": {3: "raise"}}, "NCCL says recv failed"),
    ],
)  # fmt: skip
def test_half_a_transfer_fails_in_its_time_and_a_new_way_works(
    stack: ExitStack, sender_plan: Plan, receiver_plan: Plan, reason: str
) -> None:
    """One side never arrives, or NCCL reports an error: call 0 of a kind is the first exchange, then come three pieces."""
    ends = Ends(stack, deadlines=SHORT, sender_plan=sender_plan, receiver_plan=receiver_plan)
    channel = ends.connect()
    for future in push_group(channel, 3):
        with pytest.raises(TransferFailed, match=f"the way broke.*{reason}"):
            future.result(TIMEOUT_S)
    assert not ends.sink.pieces
    push_until_it_works(channel, 7)
    assert [piece[2] for piece in seen(channel)][-1:] == [7]
    assert not ends.gave_up
    channel.close()
    ends.receiver.close()
    assert not ends.mine.gpu.nccl.live
    assert not ends.theirs.gpu.nccl.live


@pytest.mark.parametrize(
    ("sender_plan", "receiver_plan", "reason"),
    [
        ({"uid": {0: "raise"}}, {}, "no unique id"),
        ({"init": {0: "raise"}}, {}, "init failed"),
        ({}, {"init": {0: "raise"}}, "init failed"),
        ({"init": {0: "hang"}}, {}, "setting up a communicator took more than"),
        ({}, {"init": {0: "hang"}}, "setting up a communicator took more than"),
        ({"launch": {0: "hang"}}, {}, "setting up a communicator took more than"),
        ({}, {"launch": {0: "hang"}}, "setting up a communicator took more than"),
        ({"send": {0: "hang"}}, {}, "setting up a communicator took more than"),
        ({}, {"recv": {0: "hang"}}, "setting up a communicator took more than"),
    ],
)  # fmt: skip
def test_a_way_that_cannot_be_opened_is_refused_in_its_time(
    stack: ExitStack, sender_plan: Plan, receiver_plan: Plan, reason: str
) -> None:
    deadlines = Deadlines(join_s=SOON_S, transfer_s=TIMEOUT_S, abort_s=TIMEOUT_S, stall_s=TIMEOUT_S)
    ends = Ends(stack, deadlines=deadlines, sender_plan=sender_plan, receiver_plan=receiver_plan)
    with pytest.raises(TransferFailed, match=reason):
        ends.connect()
    assert not ends.gave_up


def test_creations_that_never_end_are_counted_and_the_process_is_given_up_at_last(stack: ExitStack) -> None:
    deadlines = Deadlines(join_s=0.05, transfer_s=TIMEOUT_S, abort_s=TIMEOUT_S, stall_s=TIMEOUT_S)
    ends = Ends(stack, deadlines=deadlines, sender_plan={"init": dict.fromkeys(range(9), "hang")})
    for _ in range(4):
        with pytest.raises(TransferFailed):
            ends.connect()
        assert not [reason for reason in ends.gave_up if "5" in reason]
    with pytest.raises(TransferFailed):
        ends.connect()
    assert "5 NCCL communicators were begun and never came about" in ends.gave_up


def test_an_abort_that_hangs_gives_the_process_up(stack: ExitStack) -> None:
    deadlines = Deadlines(join_s=TIMEOUT_S, transfer_s=SOON_S, abort_s=SOON_S, stall_s=TIMEOUT_S)
    ends = Ends(stack, deadlines=deadlines, sender_plan={"send": {1: "hang"}, "abort": {0: "hang"}})
    channel = ends.connect()
    with pytest.raises(TransferFailed, match="took more than"):
        push(channel, 0).result(TIMEOUT_S)
    with pytest.raises(ReplicaLost, match="aborting an NCCL communicator took more than"):
        push(channel, 1).result(TIMEOUT_S)  # queued until there is a new way, which there never is
    assert any("holds the GPU" in reason for reason in ends.gave_up)


@pytest.mark.parametrize("transport", ["nccl", "ipc"])
def test_a_device_that_stands_still_under_the_sink_fails_the_batch(stack: ExitStack, transport: str) -> None:
    ends = Ends(stack, transport, deadlines=SHORT)
    channel = ends.connect()
    ends.theirs.gpu.stands_still = True  # type: ignore[attr-defined]
    with pytest.raises(ReplicaError, match="took more than"):
        push(channel, 0).result(TIMEOUT_S)


def test_late_is_not_lost(stack: ExitStack) -> None:
    late = {1: "late"}
    plan: Plan = {"init": {0: "late"}, "launch": late, "send": late, "recv": late}
    ends = Ends(stack, sender_plan=plan, receiver_plan=plan)
    channel = ends.connect()
    for piece in range(3):
        push(channel, piece).result(TIMEOUT_S)
    assert sorted(piece[2] for piece in seen(channel)) == [0, 1, 2]


def test_a_bit_that_flips_on_the_way_is_found(stack: ExitStack) -> None:
    ends = Ends(stack, sender_plan={"send": {1: "flip"}})
    channel = ends.connect()
    with pytest.raises(TransferFailed, match=r"piece 0 .* was damaged on the way: its checksum is off by"):
        push(channel, 0).result(TIMEOUT_S)
    push(channel, 1).result(TIMEOUT_S)
    assert [piece[2] for piece in seen(channel)] == [1]


def test_an_ipc_piece_that_changes_after_it_was_sealed_is_found(stack: ExitStack) -> None:
    ends = Ends(stack, "ipc")
    channel = ends.connect()
    push(channel, 0).result(TIMEOUT_S)
    staging = channel._carrier.staging
    carry = channel._carrier.carry

    def spoil(link: Link, batch: Batch) -> Steps:
        staging[100] ^= 1
        return carry(link, batch)

    channel._carrier.carry = spoil  # type: ignore[method-assign]
    with pytest.raises(TransferFailed, match="damaged on the way"):
        push(channel, 1).result(TIMEOUT_S)


def test_a_write_that_does_not_end_gives_the_process_up(stack: ExitStack) -> None:
    """Its memory must never be reused, and the peer's never unmapped under it."""
    deadlines = Deadlines(join_s=TIMEOUT_S, transfer_s=SOON_S, abort_s=SOON_S, stall_s=TIMEOUT_S)
    ends = Ends(stack, "ipc", deadlines=deadlines, sender_plan={"copy": {1: "hang"}})
    channel = ends.connect()
    push(channel, 0).result(TIMEOUT_S)
    with pytest.raises(TransferFailed, match="writing to the receiver's GPU took more than"):
        push(channel, 1).result(TIMEOUT_S)
    with pytest.raises(ReplicaLost, match="stands still"):
        push(channel, 2).result(TIMEOUT_S)
    assert "the GPU stands still" in ends.gave_up[0]


def test_memory_that_cannot_be_seen_is_another_transport_s_business(stack: ExitStack) -> None:
    ends = Ends(stack, "ipc", sender_plan={"open": {0: "raise"}})
    with pytest.raises(TransferFailed, match="cannot be opened by CUDA IPC"):
        ends.connect()
    push(ends.connect(), 0).result(TIMEOUT_S)


def test_memory_of_senders_that_are_gone_is_used_again(stack: ExitStack) -> None:
    ends = Ends(stack, "ipc")
    gpu = ends.theirs.gpu
    share, regions = gpu.share, list[Region]()

    def counted(nbytes: int) -> Region:
        regions.append(share(nbytes))
        return regions[-1]

    gpu.share = counted  # type: ignore[method-assign]
    for piece in range(3):
        channel = ends.connect()
        push(channel, piece).result(TIMEOUT_S)
        channel.close()
        assert ends.sink.one_is_gone.wait(TIMEOUT_S)
        ends.sink.one_is_gone.clear()
    assert len(regions) == 1
    assert not ends.mine.gpu.opened  # type: ignore[attr-defined]


@pytest.mark.parametrize("transport", ["nccl", "ipc"])
def test_closing_either_end_tells_the_other(stack: ExitStack, transport: str) -> None:
    ends = Ends(stack, transport)
    first, second = ends.connect(), ends.connect()
    first.close()
    assert ends.sink.one_is_gone.wait(TIMEOUT_S)
    call = second.call({"op": "never"}, TIMEOUT_S)
    second.call({"op": "echo"}, TIMEOUT_S).result(TIMEOUT_S)
    ends.receiver.close()
    with pytest.raises(ReplicaLost):
        call.result(TIMEOUT_S)
    with pytest.raises(ReplicaLost):
        push(second, 0).result(TIMEOUT_S)
    with pytest.raises(ReplicaLost, match="cannot be reached"):
        ends.connect()


def test_many_senders_and_refusals_at_once(stack: ExitStack) -> None:
    """Pieces of five senders through one GPU, one group at a time; a fenced attempt is refused and the others go on."""
    ends = Ends(stack)
    channels = [ends.connect() for _ in range(5)]
    good = [push(channel, piece, 100_000) for piece in range(10) for channel in channels]
    bad = send(channels[0], header(99, 64, epoch=REFUSED_EPOCH), bytes(64))
    for future in good:
        future.result(TIMEOUT_S)
    with pytest.raises(TransferFailed, match="epoch 666"):
        bad.result(TIMEOUT_S)
    assert len(ends.sink.pieces) == 50


def test_a_stranger_gets_neither_memory_nor_a_communicator(stack: ExitStack) -> None:
    ends = Ends(stack)
    *rest, token = ends.receiver.address.split(":")
    for wrong in (token[:-1] + ("0" if token[-1] != "0" else "1"), "x", "ü"):
        with pytest.raises(TransferFailed, match="refused the handshake") as refusal:
            ends.connect(":".join([*rest, wrong]))
        assert token not in str(refusal.value)
    assert ends.sink.gone == []


@pytest.mark.parametrize("address", ["", "gpu", "gpu:host", "gpu:host:port:token", "gpu:host:1:", "shm:name:token"])
def test_what_is_no_address_is_refused(stack: ExitStack, address: str) -> None:
    with pytest.raises(TransferFailed, match="not the address"):
        open_nccl(address, "prefill-0", Ends(stack).mine)


def test_a_transport_that_is_not_offered_is_refused(stack: ExitStack) -> None:
    ends = Ends(stack, "ipc")
    ends.receiver.transports = {}
    with pytest.raises(TransferFailed, match="refused the handshake"):
        ends.connect()


def test_turns_are_given_one_at_a_time_in_the_order_of_asking() -> None:
    turns, woken = Turns(), list[str]()
    assert turns.ask("a", lambda: woken.append("a"))
    assert not turns.ask("b", lambda: woken.append("b"))
    assert not turns.ask("c", lambda: woken.append("c"))
    turns.leave("b")
    assert not woken
    turns.leave("a")
    assert woken == ["c"]
    assert turns.ask("c", lambda: None)
    turns.leave("nobody")
    turns.leave("c")
    assert turns.ask("d", lambda: None)


def test_what_lies_outside_the_staging_memory_breaks_the_way_and_touches_nothing(stack: ExitStack) -> None:
    ends = Ends(stack)
    channel = ends.connect()
    allocate = channel._arena.allocate
    channel._arena.allocate = lambda nbytes: None if allocate(nbytes) is None else STAGING_BYTES - 64  # type: ignore[method-assign]
    channel._arena.free = lambda offset: None  # type: ignore[method-assign]
    with pytest.raises(TransferFailed):
        channel.push(header(0, 5000), lambda out: np.asarray(out).fill(1)).result(TIMEOUT_S)
    push_until_it_works(channel, 1)
    assert [piece[2] for piece in seen(channel)] == [1]
