"""All replicas with their loads, ordered and indexed, so that a decision looks at a few of a thousand.

Holds no promise and reads no clock; `Books` keeps it up to date. Each replica has a slot, the number of its bit: sets of
replicas are numbers. Slots depend on who came first, so nothing that is decided may depend on them.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter

from ernie_cluster.config.pool import Role
from ernie_cluster.policy.cost import pace_s, queue_s, rank_s
from ernie_cluster.policy.holders import Holders
from ernie_cluster.policy.ring import Ring
from ernie_cluster.policy.snapshot import ReplicaSnapshot

_FEW = 16
"""Replicas that are sorted rather than looked for in the order of all."""


@dataclass(slots=True, eq=False)
class Member:
    """One replica in its pool."""

    slot: int
    now: ReplicaSnapshot
    """With the open promises folded in."""
    rank: tuple[float, str] = (0.0, "")
    """Least is best; the id makes it unique."""
    wait_s: float = 0.0
    """`queue_s` of its load."""
    pace_s: float = 0.0
    """`pace_s` of its load."""
    bit: int = field(init=False)

    def __post_init__(self) -> None:
        self.bit = 1 << self.slot

    def tell(self, now: ReplicaSnapshot) -> None:
        """A new load."""
        self.now, self.rank = now, (rank_s(now), now.replica_id)
        self.wait_s, self.pace_s = queue_s(now), pace_s(now)


_Entry = tuple[tuple[float, str], Member]
"""A rank, whose it is."""


class Pool:
    """The replicas of one role of one model."""

    def __init__(self) -> None:
        self.mask = 0
        """Those to which new work may be sent."""
        self.nodes: defaultdict[str, int] = defaultdict(int)
        """The same by node."""
        self.parting = 0
        """Those that take no new work, and may still be asked for what they hold."""
        self.ring = Ring()
        """The same, for pictures."""
        self.capacity = 0
        """Tokens that the largest replica holds, whatever its state; 0 while no size is known."""
        self._order: list[_Entry] = []  # the same, best first
        self._members: dict[int, Member] = {}
        self._capacities: Counter[int] = Counter()  # of all, whatever their state

    def __len__(self) -> int:
        """How many are there, whatever their state."""
        return len(self._members)

    @property
    def usable(self) -> list[ReplicaSnapshot]:
        """Those to which new work may be sent, best first."""
        return [member.now for _, member in self._order]

    def member(self, slot: int) -> Member:
        """The replica in a slot of this pool."""
        return self._members[slot]

    def best(self, among: int, fits: Callable[[ReplicaSnapshot], bool], count: int) -> list[Member]:
        """Of the usable ones of `among` those that fit, best first, at most `count`."""
        found: list[Member] = []
        among &= self.mask
        for _, member in self._order if among.bit_count() > _FEW else self._sorted(among):
            if among & member.bit and fits(member.now):
                found.append(member)
                if len(found) == count:
                    break
        return found

    def lenders(self, among: int, fits: Callable[[ReplicaSnapshot], bool]) -> list[Member]:
        """Who of `among` may be asked for what it holds: the best usable one, and all that part."""
        found, parting = self.best(among, fits, 1), among & self.parting
        while parting:
            slot = parting.bit_length() - 1
            parting ^= 1 << slot
            if fits(self._members[slot].now):
                found.append(self._members[slot])
        return found

    def on(self, node_id: str) -> int:
        """Usable and parting ones of a node."""
        mask, parting = self.nodes.get(node_id, 0), self.parting
        while parting:
            slot = parting.bit_length() - 1
            parting ^= 1 << slot
            if self._members[slot].now.node_id == node_id:
                mask |= 1 << slot
        return mask

    def _sorted(self, among: int) -> list[_Entry]:
        """The part of the order that is about these."""
        found = []
        while among:
            slot = among.bit_length() - 1
            among ^= 1 << slot
            member = self._members[slot]
            found.append((member.rank, member))
        found.sort()
        return found

    def put(self, member: Member) -> None:
        """Take in a replica that is not here."""
        now = member.now
        self._members[member.slot] = member
        if size := now.total_blocks * now.block_size:
            self._capacities[size] += 1
            self.capacity = max(self.capacity, size)
        if now.is_usable:
            insort(self._order, (member.rank, member))
            if not self.mask & member.bit:
                self.mask |= member.bit
                self.nodes[now.node_id] |= member.bit
                if now.role == "vision":
                    self.ring.add(now.replica_id, member.slot)
            return
        if self.mask & member.bit:
            self._retire(member.slot, now)
        if now.is_ready:
            self.parting |= member.bit

    def update(self, member: Member, now: ReplicaSnapshot) -> None:
        """The new load of a replica that is here."""
        self._remove(member)
        member.tell(now)
        self.put(member)

    def drop(self, member: Member) -> None:
        """A replica is gone."""
        self._remove(member)
        if self.mask & member.bit:
            self._retire(member.slot, member.now)

    def _remove(self, member: Member) -> None:
        del self._members[member.slot]
        self.parting &= ~member.bit
        if size := member.now.total_blocks * member.now.block_size:
            self._capacities[size] -= 1
            if not self._capacities[size]:
                del self._capacities[size]
                if size == self.capacity:
                    self.capacity = max(self._capacities, default=0)
        if self.mask & member.bit:
            index = bisect_left(self._order, (member.rank,))
            assert self._order[index][1] is member, f"{member.now.replica_id} is not where its rank says"
            del self._order[index]

    def _retire(self, slot: int, now: ReplicaSnapshot) -> None:
        bit = 1 << slot
        self.mask &= ~bit
        self.nodes[now.node_id] &= ~bit
        if not self.nodes[now.node_id]:
            del self.nodes[now.node_id]
        if now.role == "vision":
            self.ring.remove(now.replica_id)


class Fleet:
    """See the module. A replica's model and node stay as they were first told; another life is another replica."""

    def __init__(self) -> None:
        self.holders = Holders()
        self._members: dict[str, Member] = {}
        self._pools: defaultdict[tuple[str, Role], Pool] = defaultdict(Pool)
        self._free_slots: list[int] = []

    @classmethod
    def of(cls, replicas: Iterable[ReplicaSnapshot]) -> Fleet:
        """One that holds just these."""
        fleet = cls()
        for replica in replicas:
            fleet.put(replica)
        return fleet

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members.values())

    def member(self, replica_id: str) -> Member | None:
        """One replica, or None."""
        return self._members.get(replica_id)

    def pool(self, model: str, role: Role) -> Pool:
        """The replicas of a role, maybe none."""
        return self._pools.get((model, role), _EMPTY)

    def roles(self, model: str) -> set[Role]:
        """Roles of a model that have a replica, whatever its state."""
        return {role for (name, role), pool in self._pools.items() if name == model and len(pool)}

    def bits(self, replica_ids: Collection[str]) -> int:
        """The set of these replicas; unknown ones are in none."""
        return sum(self._members[i].bit for i in set(replica_ids) if i in self._members)

    def put(self, now: ReplicaSnapshot) -> None:
        """Take in a replica, or its new load."""
        member = self._members.get(now.replica_id)
        if member is not None and member.now.role == now.role:
            self._pools[now.model, now.role].update(member, now)
            return
        if member is None:
            slot = heapq.heappop(self._free_slots) if self._free_slots else len(self._members)
            member = self._members[now.replica_id] = Member(slot, now)
        else:  # what it holds, it holds in its new role, too
            self._pools[member.now.model, member.now.role].drop(member)
        member.tell(now)
        self._pools[now.model, now.role].put(member)

    def drop(self, replica_id: str) -> None:
        """A replica is gone, and its cache with it."""
        member = self._members.pop(replica_id, None)
        if member is not None:
            self._pools[member.now.model, member.now.role].drop(member)
            self.holders.forget(member.slot)
            heapq.heappush(self._free_slots, member.slot)

    def check(self) -> None:
        """Assert what must hold between any two calls."""
        self.holders.check()
        slots = [m.slot for m in self._members.values()]
        assert len(set(slots)) == len(slots), "two replicas share a slot"
        for (model, role), pool in self._pools.items():
            own = [m for m in self if (m.now.model, m.now.role) == (model, role)]
            ranked = sorted((m for m in own if m.now.is_usable), key=_rank)
            assert len(pool) == len(own), f"{model} {role}: {len(pool)} replicas, not {len(own)}"
            assert pool.usable == [m.now for m in ranked], f"{model} {role} is out of order"
            assert pool.mask == sum(m.bit for m in ranked), f"{model} {role}: another set is usable"
            parting = sum(m.bit for m in own if m.now.is_ready and m.now.is_draining)
            assert pool.parting == parting, f"{model} {role}: others part"
            sizes = [m.now.total_blocks * m.now.block_size for m in own if m.now.total_blocks]
            assert pool.capacity == max(sizes, default=0), f"{model} {role}: capacity {pool.capacity}"


_EMPTY = Pool()


_rank = attrgetter("rank")
