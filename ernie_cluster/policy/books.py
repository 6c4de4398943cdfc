"""The router's memory: replicas as they last told of themselves, and what was promised of them since.

It reads no clock: `now_s` comes in, from any clock that never runs backwards, the same one in every call. A promise
bridges the time from a decision until the replica's own snapshot shows its effect.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ernie_cluster.deltas import Delta
from ernie_cluster.policy.cost import queue_s
from ernie_cluster.policy.fleet import Fleet
from ernie_cluster.policy.snapshot import Promise, ReplicaSnapshot


@dataclass(slots=True)
class _Entry:
    promise: Promise
    incarnation: str
    confirmed_s: float | None = None


@dataclass(slots=True)
class _Decision:
    promises: tuple[Promise, ...]
    incarnations: dict[str, str]
    """By replica."""
    deadline_s: float


@dataclass(slots=True)
class _Report:
    snapshot: ReplicaSnapshot
    taken_s: float


class Books:
    """Last snapshots and open promises. A promise ends in one of four ways, whichever comes first:

    released (the request is over, or never started) · past its deadline · its replica restarted · confirmed by the
    replica, and a snapshot that was taken later has arrived, which shows what the promise stood for.

    What a promise says of caches holds on until its request is over: blocks fill up while it is worked on.
    """

    def __init__(self, heartbeat_timeout_s: float, forget_s: float | None = None) -> None:
        """Replicas whose last snapshot is older than `heartbeat_timeout_s` are suspects, those silent for `forget_s` are
        forgotten; None = with the first suspicion."""
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._forget_s = heartbeat_timeout_s if forget_s is None else forget_s
        self._fleet = Fleet()
        self._reports: dict[str, _Report] = {}
        self._silences: list[tuple[float, str]] = []  # heap: when a replica was heard of, or earlier; one for each
        self._silent: set[str] = set()
        """Those that were silent for too long; no others are in the heap."""
        self._suspects: set[str] = set()
        self._open: dict[str, dict[str, _Entry]] = {}  # by replica, then by key
        self._decisions: dict[str, _Decision] = {}  # by key
        self._deadlines: list[tuple[float, str]] = []  # heap; keys that are over may still be there

    def report(self, snapshot: ReplicaSnapshot, now_s: float) -> None:
        """Take in a snapshot; one older than what is known changes nothing."""
        replica_id, taken_s = snapshot.replica_id, now_s - snapshot.age_s
        known = self._reports.get(replica_id)
        if known is not None:
            if taken_s < known.taken_s:
                return
            if known.snapshot.incarnation != snapshot.incarnation:
                self._drop(replica_id)
        is_new = replica_id not in self._reports
        if is_new:
            heapq.heappush(self._silences, (taken_s, replica_id))
        self._reports[replica_id] = _Report(snapshot, taken_s)
        self._suspects.discard(replica_id)
        if replica_id in self._silent:
            self._silent.remove(replica_id)
            heapq.heappush(self._silences, (taken_s, replica_id))
        entries = self._open.get(replica_id, {})
        for key in [key for key, entry in entries.items() if _is_void(entry, snapshot, taken_s)]:
            del entries[key]
        self._fold(replica_id)
        if is_new:
            for decision in self._decisions.values():
                self._expect(decision, replica_id)

    def seen(self, replica_id: str) -> int | None:
        """Up to which version the cache of a replica is known; None = nothing is."""
        member = self._fleet.member(replica_id)
        return None if member is None else self._fleet.holders.version(member.slot)

    def cached(self, replica_id: str, delta: Delta) -> None:
        """What a replica that has reported told of its cache; what does not go on from `seen` changes nothing."""
        member = self._fleet.member(replica_id)
        if member is not None:
            self._fleet.holders.apply(member.slot, delta)

    def forget(self, replica_id: str) -> None:
        """A replica is known to be gone; its next snapshot brings it back."""
        if replica_id in self._reports:
            self._drop(replica_id)

    def suspect(self, replica_id: str) -> None:
        """Somebody could not reach a replica; its next snapshot clears it."""
        if replica_id in self._reports:
            self._suspects.add(replica_id)

    def suspects(self, now_s: float) -> frozenset[str]:
        """Replicas that are there, and may hang."""
        self.fleet(now_s)
        return frozenset(self._suspects)

    def promise(self, key: str, promises: Iterable[Promise], deadline_s: float) -> None:
        """Book the promises of one decision, all of replicas in the last `fleet`.

        Args:
            key: names the decision, for example request and attempt; not booked yet.
            deadline_s: when they lapse by themselves, on the clock of `now_s`.
        """
        assert key not in self._decisions, f"{key!r} is booked already"
        taken = tuple(promises)
        incarnations = {p.replica_id: self._reports[p.replica_id].snapshot.incarnation for p in taken}
        decision = self._decisions[key] = _Decision(taken, incarnations, deadline_s)
        heapq.heappush(self._deadlines, (deadline_s, key))
        for promise in taken:
            entry = _Entry(promise, incarnations[promise.replica_id])
            self._open.setdefault(promise.replica_id, {})[key] = entry
            self._fold(promise.replica_id)
            self._expect(decision, promise.replica_id)

    def confirm(self, key: str, replica_id: str, now_s: float) -> None:
        """The replica holds now what was promised; its next snapshot will show it. Unknown keys are over already."""
        entry = self._open.get(replica_id, {}).get(key)
        if entry is not None and entry.confirmed_s is None:
            entry.confirmed_s = now_s

    def release(self, key: str) -> None:
        """Drop all promises of a decision; harmless when they are over already."""
        decision = self._decisions.pop(key, None)
        if decision is None:
            return
        for promise in decision.promises:
            replica_id = promise.replica_id
            member = self._fleet.member(replica_id)
            if member is not None and self._is_of(decision, replica_id):
                self._fleet.holders.unexpect(member.slot, promise.items)
            entries = self._open.get(replica_id, {})
            if entries.pop(key, None) is not None:
                self._fold(replica_id)
            if not entries:
                self._open.pop(replica_id, None)

    def fleet(self, now_s: float) -> Fleet:
        """Replicas heard of lately, their loads raised by the open promises; what has run out is dropped.

        It goes on changing with the books.
        """
        while self._silences and now_s - self._silences[0][0] > self._heartbeat_timeout_s:
            replica_id = self._silences[0][1]
            taken_s = self._reports[replica_id].taken_s
            if now_s - taken_s > self._heartbeat_timeout_s:
                heapq.heappop(self._silences)
                self._silent.add(replica_id)
                self._suspects.add(replica_id)
            else:
                heapq.heapreplace(self._silences, (taken_s, replica_id))
        for replica_id in [i for i in self._silent if now_s - self._reports[i].taken_s > self._forget_s]:
            self._drop(replica_id)
        while self._deadlines and self._deadlines[0][0] < now_s:
            deadline_s, key = heapq.heappop(self._deadlines)
            decision = self._decisions.get(key)
            if decision is not None and decision.deadline_s == deadline_s:
                self.release(key)
        return self._fleet

    def view(self, now_s: float) -> tuple[ReplicaSnapshot, ...]:
        """The same by id, as values with their ages."""
        folded = {member.now.replica_id: member.now for member in self.fleet(now_s)}
        return tuple(replace(folded[k], age_s=now_s - self._reports[k].taken_s) for k in sorted(folded))

    def worked_off_s(self, replica_id: str, now_s: float) -> float:
        """Of the queue that a replica told of: how many seconds it has worked on it since then."""
        report = self._reports[replica_id]
        return min(now_s - report.taken_s, queue_s(report.snapshot))

    @property
    def num_promises(self) -> int:
        """Open promises over all decisions."""
        return sum(map(len, self._open.values()))

    def check(self) -> None:
        """Assert what must hold between any two calls."""
        self._fleet.check()
        assert {m.now.replica_id for m in self._fleet} == self._reports.keys(), "fleet and reports differ"
        watched = [*self._silent, *(i for _, i in self._silences)]
        assert sorted(watched) == sorted(self._reports), "some silence is not watched"
        assert self._suspects >= self._silent, "somebody is silent and not suspected"
        assert self._reports.keys() >= self._suspects, "somebody is suspected who is not there"
        for replica_id, report in self._reports.items():
            s = report.snapshot
            assert s.replica_id == replica_id, f"{s.replica_id} is filed under {replica_id}"
            assert 0 <= s.free_blocks <= s.total_blocks, f"{replica_id}: {s.free_blocks} of {s.total_blocks} free"
            assert min(s.num_running, s.num_waiting, s.waiting_tokens) >= 0, f"{replica_id}: negative load"
            member = self._fleet.member(replica_id)
            assert member is not None
            assert member.now == self._folded(replica_id), f"{replica_id} is folded wrong"
        for replica_id, entries in self._open.items():
            for key, entry in entries.items():
                p = entry.promise
                assert key in self._decisions, f"{key!r} is over but kept"
                assert min(p.blocks, p.tokens, p.media_tokens) >= 0, f"{key!r}: negative promise {p}"
                known = self._reports.get(replica_id)
                assert known is None or not _is_void(entry, known.snapshot, known.taken_s), f"{key!r} is void but kept"

    def _drop(self, replica_id: str) -> None:
        member = self._fleet.member(replica_id)
        assert member is not None
        for decision in self._decisions.values():
            if self._is_of(decision, replica_id):
                for promise in decision.promises:
                    if promise.replica_id == replica_id:
                        self._fleet.holders.unexpect(member.slot, promise.items)
        self._fleet.drop(replica_id)
        del self._reports[replica_id]
        self._suspects.discard(replica_id)
        self._silent.discard(replica_id)
        self._silences = [entry for entry in self._silences if entry[1] != replica_id]
        heapq.heapify(self._silences)

    def _fold(self, replica_id: str) -> None:
        if replica_id in self._reports:
            self._fleet.put(self._folded(replica_id))

    def _folded(self, replica_id: str) -> ReplicaSnapshot:
        s = self._reports[replica_id].snapshot
        promises = [e.promise for e in self._open.get(replica_id, {}).values() if e.incarnation == s.incarnation]
        if not promises:
            return s
        return replace(
            s,
            num_waiting=s.num_waiting + len(promises),
            waiting_tokens=s.waiting_tokens + sum(p.tokens + p.media_tokens for p in promises),
            free_blocks=max(0, s.free_blocks - sum(p.blocks for p in promises)),
        )

    def _expect(self, decision: _Decision, replica_id: str) -> None:
        member = self._fleet.member(replica_id)
        if member is not None and self._is_of(decision, replica_id):
            for promise in decision.promises:
                if promise.replica_id == replica_id:
                    self._fleet.holders.expect(member.slot, promise.items)

    def _is_of(self, decision: _Decision, replica_id: str) -> bool:
        """Whether a decision was about this life of a replica."""
        return decision.incarnations.get(replica_id) == self._reports[replica_id].snapshot.incarnation


def _is_void(entry: _Entry, snapshot: ReplicaSnapshot, taken_s: float) -> bool:
    """Whether this snapshot of its replica makes a promise void: it shows it, or comes from another life."""
    is_shown = entry.confirmed_s is not None and taken_s > entry.confirmed_s
    return is_shown or snapshot.incarnation != entry.incarnation
