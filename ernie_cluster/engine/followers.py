"""A leader's line to the ranks of its gang that hold the other KV heads.

Each follower keeps a mirror of what it must know: the leases that pieces may be written under, and the hand-overs that
it has a part in (see `follower.Follower`). The books are the leader's alone; what it tells is

    expect    a lease: which blocks pieces of which attempt may be written to
    complete  all pieces of an attempt must be there; ends the mirror of its lease
    forget    ends the mirror of a lease; its blocks are free when every follower has said so
    reach     open channels to the ranks of a decode replica
    settle    answered when all that this rank had to send is accepted, or some of it never will be
    lend      push cached blocks now, between any steps, and settle

by calls with a deadline, and with the steps, in their order, what of a hand-over is to be pushed, and what ends; and what
each copies between its cache and its part of the host's memory, in the order in which the leader has done so.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Literal

from torch import Tensor

from ernie_cluster.engine.host_tier import Copies, HostMemory
from ernie_cluster.engine.leases import Lease
from ernie_cluster.engine.slices import Run
from ernie_cluster.errors import EngineFailed, PeerSilent, ReplicaError, ReplicaLost, TransferFailed
from ernie_cluster.transport.base import JSON, Channel, Message
from ernie_cluster.transport.choose import Endpoint


class Followers:
    """Owns nothing: the channels are those of whoever set them. Safe to use from any thread.

    Args:
        note: says something with the next step, see `Crew.note`.
        timeout_s: of each call.
        broken: called with the error when a follower cannot be told what it must know; the gang is to be replaced.
    """

    def __init__(
        self, note: Callable[[Message], None], timeout_s: float, broken: Callable[[EngineFailed], None]
    ) -> None:
        self._note, self._timeout_s, self._broken = note, timeout_s, broken
        self.channels: Sequence[Channel] = ()
        """To each of them; empty where this rank holds all KV heads."""
        self._num_copied = 0

    def __len__(self) -> int:
        return len(self.channels)

    # ---- calls: done with what each answers, or with the first error; at once where nobody follows

    def expect(self, lease: Lease) -> Future[list[Message]]:
        """Pieces may be written under a lease when this is done."""
        attempt = lease.request_id, lease.epoch
        return self._insist(
            "expect", *attempt, blocks=list(lease.blocks), num_shared=lease.num_shared, num_copied=self._num_copied
        )

    def forget(self, lease: Lease) -> Future[list[Message]]:
        """Nothing is written under a lease any more when this is done."""
        return self._insist("forget", lease.request_id, lease.epoch)

    def complete(self, lease: Lease, num_tokens: int) -> Future[list[Message]]:
        """Whether the KV of so many tokens has come for a lease."""
        return self._ask("complete", lease.request_id, lease.epoch, num_tokens=num_tokens)

    def reach(self, request_id: str, epoch: int, ranks: Sequence[Endpoint]) -> Future[list[Message]]:
        """A prompt is to be handed over to these ranks."""
        return self._ask("reach", request_id, epoch, ranks=[rank.to_json() for rank in ranks])

    def settle(self, request_id: str, epoch: int, num_blocks: int) -> Future[list[Message]]:
        """All that each had to send of so many blocks is accepted; with the pieces that went to rank 0 over there."""
        return self._ask("settle", request_id, epoch, num_blocks=num_blocks)

    def lend(self, run: Run) -> Future[list[Message]]:
        """Blocks that were computed long ago are pushed, and accepted; answered as `settle`."""
        outgoing = run.outgoing
        attempt = outgoing.request_id, outgoing.epoch
        return self._ask(
            "lend", *attempt, first_block=run.first_block, blocks=list(run.blocks), num_copied=self._num_copied
        )

    # ---- before the next step

    def copy(self, order: Literal["offload", "restore"], copies: Copies) -> None:
        """Copies that are done here are to be done everywhere, before anything that comes later reads or writes there."""
        if self.channels:
            self._num_copied += 1
            self._say({order: [[slot, block] for slot, block in copies]})

    def erase(self, order: Literal["poison", "clean"], blocks: Sequence[int]) -> None:
        """Likewise for blocks that are erased here, see `poison`."""
        if self.channels:
            self._num_copied += 1
            self._say({order: list(blocks)})

    # ---- with the next step

    def push(self, run: Run) -> None:
        """Blocks of a hand-over are complete after the step."""
        outgoing = run.outgoing
        self._say({"push": [outgoing.request_id, outgoing.epoch, run.first_block, list(run.blocks)]})

    def drop(self, request_id: str, epoch: int) -> None:
        """A hand-over ends without having been settled."""
        self._say({"drop": [request_id, epoch]})

    # ---- inside

    def _say(self, note: Message) -> None:
        if self.channels:
            self._note(note)

    def _ask(self, kind: str, request_id: str, epoch: int, **more: JSON) -> Future[list[Message]]:
        message: Message = {"type": kind, "request_id": request_id, "epoch": epoch, **more}
        return _together([channel.call(message, self._timeout_s) for channel in self.channels])

    def _insist(self, kind: str, request_id: str, epoch: int, **more: JSON) -> Future[list[Message]]:
        """`_ask`, for what every follower must know: that one does not answer is the end of the gang."""
        answer = self._ask(kind, request_id, epoch, **more)
        answer.add_done_callback(self._look_at)
        return answer

    def _look_at(self, answer: Future[list[Message]]) -> None:
        error = answer.exception()
        if error is not None:
            self._broken(EngineFailed(f"a rank of this gang does not answer its leader: {error}"))


class LedMemory(HostMemory):
    """The leader's part of the host's memory; followers copy the same blocks to and from theirs.

    Args:
        kv, num_slots: see `HostMemory`.
        followers: the ranks that hold the other KV heads.
    """

    def __init__(self, kv: Tensor, num_slots: int, followers: Followers) -> None:
        super().__init__(kv, num_slots)
        self._followers = followers

    def offload(self, copies: Copies) -> None:
        """See `HostMemory`."""
        super().offload(copies)
        self._followers.copy("offload", copies)

    def restore(self, copies: Copies) -> None:
        """See `HostMemory`."""
        super().restore(copies)
        self._followers.copy("restore", copies)


def _together(calls: Sequence[Future[Message]]) -> Future[list[Message]]:
    """All results in order; fails at once with the first `_error_of`."""
    whole: Future[list[Message]] = Future()
    lock, num_left, is_over = threading.Lock(), len(calls), False
    if not calls:
        whole.set_result([])

    def answered(call: Future[Message]) -> None:
        nonlocal num_left, is_over
        error = _error_of(call)
        with lock:
            num_left -= 1
            if is_over or (error is None and num_left):
                return
            is_over = True
        if error is not None:
            whole.set_exception(error)
        else:
            whole.set_result([done.result() for done in calls])

    for call in calls:
        call.add_done_callback(answered)
    return whole


_BLAMED: dict[str, type[ReplicaError]] = {"lost": ReplicaLost, "silent": PeerSilent}
"""Errors that the replica on the other side is to blame for, by their names on the wire."""


def refusal(error: Exception) -> Message:
    """What a follower answers where something went wrong with the other side."""
    kind = next((name for name, blamed in _BLAMED.items() if isinstance(error, blamed)), None)
    return {"error": f"{error}" or type(error).__name__, "kind": kind}


def _error_of(call: Future[Message]) -> Exception | None:
    """Whose fault it was must be seen by whoever tries again: the other side's, or a rank's of our own."""
    error = call.exception()
    if isinstance(error, ReplicaLost):
        return EngineFailed(f"a rank of this gang is gone: {error}")
    if error is not None:
        return error if isinstance(error, Exception) else EngineFailed(repr(error))
    answer = call.result()
    if "error" not in answer:
        return None
    return _BLAMED.get(str(answer.get("kind")), TransferFailed)(str(answer["error"]))
