"""A leader's line to the ranks of its gang that hold the other KV heads.

Each follower keeps a mirror of what it must know: the leases that pieces may be written under, and the hand-overs that
it has a part in (see `follower.Follower`). The books are the leader's alone; what it tells is

    expect    a lease: which blocks pieces of which attempt may be written to
    complete  all pieces of an attempt must be there; ends the mirror of its lease
    forget    ends the mirror of a lease; its blocks are free when every follower has said so
    reach     open channels to the ranks of a decode replica
    settle    answered when all that this rank had to send is accepted, or some of it never will be

by calls with a deadline, and with the steps, in their order, what of a hand-over is to be pushed, and what ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from ernie_cluster.errors import EngineFailed, TransferFailed
from ernie_cluster.transport.base import Channel, Message


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

    def __len__(self) -> int:
        return len(self.channels)

    def ask(self, message: Message) -> Future[list[Message]]:
        """What each answers, or the first error; done at once where there are none."""
        return _together([channel.call(message, self._timeout_s) for channel in self.channels])

    def insist(self, message: Message) -> Future[list[Message]]:
        """`ask`, for what every follower must know: that one does not answer is the end of the gang."""
        answer = self.ask(message)
        answer.add_done_callback(self._look_at)
        return answer

    def note(self, order: Message) -> None:
        """Say something with the next step."""
        if self.channels:
            self._note(order)

    def drop(self, request_id: str, epoch: int) -> None:
        """A hand-over ends without having been settled."""
        self.note({"drop": [request_id, epoch]})

    def _look_at(self, answer: Future[list[Message]]) -> None:
        error = answer.exception()
        if error is not None:
            self._broken(EngineFailed(f"a rank of this gang does not answer its leader: {error}"))


def _together(calls: Sequence[Future[Message]]) -> Future[list[Message]]:
    """All results in order; the first failure, or an `error` that somebody answers, fails it at once."""
    whole: Future[list[Message]] = Future()
    lock, num_left, is_over = threading.Lock(), len(calls), False
    if not calls:
        whole.set_result([])

    def answered(call: Future[Message]) -> None:
        nonlocal num_left, is_over
        error = call.exception()
        if error is None and "error" in call.result():
            error = TransferFailed(str(call.result()["error"]))
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
