"""What a decision may look at: replicas as they last told of themselves, and what was promised of them since.

`Books` is the router's memory. It reads no clock: `now_s` comes in, from any clock that never runs backwards, the same
one in every call. A promise bridges the time from a decision until the replica's own snapshot shows its effect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from ernie_cluster.config.cluster import Role
from ernie_cluster.config.experts import ExpertUse


@dataclass(frozen=True, slots=True)
class ReplicaSnapshot:
    """One replica, as it described itself."""

    replica_id: str
    """The same after a restart."""
    model: str
    role: Role
    node_id: str
    incarnation: str
    """Another after each restart; what was promised of an earlier one is void."""
    is_ready: bool
    is_draining: bool
    """Finishes what it has and takes no more."""
    num_running: int
    num_waiting: int
    waiting_tokens: int
    """Prompt tokens not yet computed; media tokens not yet encoded on a vision replica."""
    free_blocks: int
    """KV blocks that nothing holds, leases, or waits for; what a prefix cache could evict counts as free."""
    total_blocks: int
    """KV blocks in all; 0 on a vision replica, or while not yet known."""
    block_size: int
    """Tokens per KV block."""
    age_s: float = 0.0
    """Seconds since it was taken, at most; a caller that asked for it counts from the asking."""
    experts: ExpertUse | None = None
    """For status pages; None without experts."""

    @property
    def is_usable(self) -> bool:
        """Whether new work may be sent."""
        return self.is_ready and not self.is_draining


@dataclass(frozen=True, slots=True)
class Demand:
    """What one request needs."""

    model: str
    num_prompt_tokens: int
    """With one per media token; at least 1."""
    max_tokens: int
    """Most output tokens, at least 1."""
    num_media: int = 0
    """Pictures and videos to encode."""
    media_tokens: int = 0
    """Their tokens in the prompt."""

    def __post_init__(self) -> None:
        assert self.num_prompt_tokens >= 1, f"num_prompt_tokens = {self.num_prompt_tokens}"
        assert self.max_tokens >= 1, f"max_tokens = {self.max_tokens}"
        assert 0 <= self.media_tokens <= self.num_prompt_tokens, f"media_tokens = {self.media_tokens}"


@dataclass(frozen=True, slots=True)
class Promise:
    """What one decision takes of one replica."""

    replica_id: str
    blocks: int = 0
    """KV blocks to be leased."""
    tokens: int = 0
    """Prompt tokens to be computed."""
    media_tokens: int = 0
    """Media tokens to be encoded."""


@dataclass(slots=True)
class _Entry:
    promise: Promise
    incarnation: str
    deadline_s: float
    confirmed_s: float | None = None


@dataclass(slots=True)
class _Report:
    snapshot: ReplicaSnapshot
    taken_s: float


class Books:
    """Last snapshots and open promises. A promise ends in one of four ways, whichever comes first:

    released (the request is over, or never started) · past its deadline · its replica restarted · confirmed by the
    replica, and a snapshot that was taken later has arrived, which shows what the promise stood for.
    """

    def __init__(self, heartbeat_timeout_s: float) -> None:
        """Replicas whose last snapshot is older than `heartbeat_timeout_s` are forgotten."""
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._reports: dict[str, _Report] = {}
        self._entries: dict[str, list[_Entry]] = {}  # by key

    def report(self, snapshot: ReplicaSnapshot, now_s: float) -> None:
        """Take in a snapshot; one older than what is known changes nothing."""
        taken_s = now_s - snapshot.age_s
        known = self._reports.get(snapshot.replica_id)
        if known is not None and taken_s < known.taken_s:
            return
        self._reports[snapshot.replica_id] = _Report(snapshot, taken_s)
        self._keep(lambda e: e.promise.replica_id != snapshot.replica_id or not _is_void(e, snapshot, taken_s))

    def forget(self, replica_id: str) -> None:
        """A replica is known to be gone; its next snapshot brings it back."""
        self._reports.pop(replica_id, None)

    def promise(self, key: str, promises: Iterable[Promise], deadline_s: float) -> None:
        """Book the promises of one decision, all of replicas in the last `view`.

        Args:
            key: names the decision, for example request and attempt; not booked yet.
            deadline_s: when they lapse by themselves, on the clock of `now_s`.
        """
        assert key not in self._entries, f"{key!r} is booked already"
        self._entries[key] = [_Entry(p, self._reports[p.replica_id].snapshot.incarnation, deadline_s) for p in promises]

    def confirm(self, key: str, replica_id: str, now_s: float) -> None:
        """The replica holds now what was promised; its next snapshot will show it. Unknown keys are over already."""
        for entry in self._entries.get(key, ()):
            if entry.promise.replica_id == replica_id and entry.confirmed_s is None:
                entry.confirmed_s = now_s

    def release(self, key: str) -> None:
        """Drop all promises of a decision; harmless when they are over already."""
        self._entries.pop(key, None)

    def view(self, now_s: float) -> tuple[ReplicaSnapshot, ...]:
        """Replicas heard of lately, by id, their loads raised by the open promises; drops what has run out."""
        self._reports = {k: r for k, r in self._reports.items() if now_s - r.taken_s <= self._heartbeat_timeout_s}
        self._keep(lambda e: now_s <= e.deadline_s)
        open_promises: dict[str, list[Promise]] = {k: [] for k in self._reports}
        for entries in self._entries.values():
            for entry in entries:
                report = self._reports.get(entry.promise.replica_id)
                if report is not None and report.snapshot.incarnation == entry.incarnation:
                    open_promises[entry.promise.replica_id].append(entry.promise)
        return tuple(_folded(self._reports[k], open_promises[k], now_s) for k in sorted(self._reports))

    @property
    def num_promises(self) -> int:
        """Open promises over all decisions."""
        return sum(map(len, self._entries.values()))

    def check(self) -> None:
        """Assert what must hold between any two calls."""
        for replica_id, report in self._reports.items():
            s = report.snapshot
            assert s.replica_id == replica_id, f"{s.replica_id} is filed under {replica_id}"
            assert 0 <= s.free_blocks <= s.total_blocks, f"{replica_id}: {s.free_blocks} of {s.total_blocks} free"
            assert min(s.num_running, s.num_waiting, s.waiting_tokens) >= 0, f"{replica_id}: negative load"
        for key, entries in self._entries.items():
            assert entries, f"{key!r} is booked without a promise"
            for entry in entries:
                p = entry.promise
                assert min(p.blocks, p.tokens, p.media_tokens) >= 0, f"{key!r}: negative promise {p}"
                known = self._reports.get(p.replica_id)
                if known is not None:
                    assert not _is_void(entry, known.snapshot, known.taken_s), f"{key!r} is void but kept"

    def _keep(self, is_open: Callable[[_Entry], bool]) -> None:
        kept = {key: [e for e in entries if is_open(e)] for key, entries in self._entries.items()}
        self._entries = {key: entries for key, entries in kept.items() if entries}


def _is_void(entry: _Entry, snapshot: ReplicaSnapshot, taken_s: float) -> bool:
    """Whether this snapshot of its replica makes a promise void: it shows it, or comes from another life."""
    is_shown = entry.confirmed_s is not None and taken_s > entry.confirmed_s
    return is_shown or snapshot.incarnation != entry.incarnation


def _folded(report: _Report, promises: Sequence[Promise], now_s: float) -> ReplicaSnapshot:
    s = report.snapshot
    return replace(
        s,
        num_waiting=s.num_waiting + len(promises),
        waiting_tokens=s.waiting_tokens + sum(p.tokens + p.media_tokens for p in promises),
        free_blocks=max(0, s.free_blocks - sum(p.blocks for p in promises)),
        age_s=now_s - report.taken_s,
    )
