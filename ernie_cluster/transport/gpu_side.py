"""What all ways into and out of one process's GPU share: its deadlines, whose turn it is, and what to do when it hangs."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TypeAlias

from ernie_cluster.errors import ReplicaLost, TransferFailed
from ernie_cluster.transport.base import STALL_TIMEOUT_S
from ernie_cluster.transport.gpu import Gpu, Mark

Steps: TypeAlias = Generator[float | None, None, None]
"""Work in steps that never block: each yields the seconds until the next, or None to wait for an event."""

POLL_S = 0.001
"""Pause between two looks at a mark."""
MAX_ABANDONED = 4
"""Communicators whose creation never came back: more of them, and the process is given up."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Longest waits, in seconds."""

    join_s: float = 20.0
    """For a communicator; the first of a process loads libraries and looks at the machine's links."""
    transfer_s: float = 5.0
    """For a batch that both sides have begun, and for the device to take it in."""
    abort_s: float = 5.0
    """For an abort; then the process is given up."""
    stall_s: float = STALL_TIMEOUT_S
    """For an acknowledgement; then the peer is lost."""


class Turns:
    """Who may receive now: one at a time per GPU, in the order of asking.

    A receiver's kernel spins until its sender's runs. If only the one whose turn it is has begun, no two GPUs can wait
    for each other's in a circle. Safe to use from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queue: deque[tuple[object, Callable[[], None]]] = deque()

    def ask(self, who: object, wake: Callable[[], None]) -> bool:
        """Whether it is the turn of `who`; if not, `wake` is called when it is."""
        with self._lock:
            if all(other is not who for other, _ in self._queue):
                self._queue.append((who, wake))
            return self._queue[0][0] is who

    def leave(self, who: object) -> None:
        """The turn of `who` is over, or he asks no more."""
        with self._lock:
            before = self._queue[0] if self._queue else None
            self._queue = deque(entry for entry in self._queue if entry[0] is not who)
            after = self._queue[0] if self._queue else None
        if after is not None and after is not before:
            after[1]()


@dataclass(frozen=True, slots=True, eq=False)
class GpuSide:
    """One per process.

    A kernel that waits for a dead peer and cannot be stopped holds its GPU for ever, so there is a last resort.
    """

    gpu: Gpu
    give_up: Callable[[str], None]
    """Called with the reason when this process's GPU cannot be freed any more: the process is to be replaced."""
    deadlines: Deadlines = Deadlines()
    turns: Turns = field(default_factory=Turns)
    _abandoned: set[object] = field(default_factory=set)

    def abandon(self, what: object) -> None:
        """A creation that cannot be stopped is left to itself."""
        self._abandoned.add(what)
        if len(self._abandoned) > MAX_ABANDONED:
            self.give_up(f"{len(self._abandoned)} NCCL communicators were begun and never came about")

    def came_back(self, what: object) -> None:
        """It ended after all."""
        self._abandoned.discard(what)


def until(mark: Mark, timeout_s: float, what: str) -> Steps:
    """Wait for a mark; TransferFailed, naming `what`, when it takes longer than `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while not mark.is_done():
        if time.monotonic() >= deadline_s:
            raise TransferFailed(f"{what} took more than {timeout_s} s")
        yield POLL_S


def until_still(side: GpuSide, stream: object, what: str) -> Steps:
    """Until nothing that was put into a stream touches memory any more.

    Raises:
        ReplicaLost: it does not come to an end, and the process is given up.
    """
    try:
        yield from until(side.gpu.mark(stream), side.deadlines.abort_s, what)
    except TransferFailed as e:
        side.give_up(f"the GPU stands still: {e}")
        raise ReplicaLost(f"this process's GPU stands still: {e}") from e


def run_through(steps: Steps) -> None:
    """Take all steps in the calling thread, for the end of a connection; a ReplicaLost has been told already."""
    with contextlib.suppress(ReplicaLost):
        for wait_s in steps:
            time.sleep(POLL_S if wait_s is None else wait_s)
