"""Which replicas serve a request: one decision for the whole path, with its reasons and what it takes of each.

Each way through the replicas has a cost in seconds (`policy.cost`), and the cheapest is taken. Only a few of many replicas
are looked at closely: those that hold most of the prompt or of its pictures, those with the least to do, and those on the
same node. Ties go to the lower ids, so that the order of the snapshots does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import islice

from ernie_cluster.config.cluster import RouterConfig
from ernie_cluster.policy.admission import Refusal, has_room, never_fits, own_blocks, refuse
from ernie_cluster.policy.cost import decode_s, prefill_s, queue_s, stall_s, stretch, transfer_s
from ernie_cluster.policy.encoding import Encoding, cheapest_encoder
from ernie_cluster.policy.fleet import Fleet, Member, Pool
from ernie_cluster.policy.snapshot import Demand, Promise, ReplicaSnapshot

_LEVELS = 3
"""Lengths of cached prefix that are looked at."""
_EACH = 3
"""Replicas that are looked at for each of them, and of those with the least to do."""
_STARTS = 3
"""Best replicas for a prompt for which decode partners are looked for."""
_MAX_ITEMS = 256
"""Blocks of a prompt that a replica is expected to hold soon; more would cost more time than they are worth."""


@dataclass(frozen=True, slots=True)
class Path:
    """The replicas of one request."""

    encoder: str | None
    """None when the request has no media."""
    prefill: str
    decode: str
    """The same as `prefill` when one replica does both."""
    reasons: tuple[str, ...]
    """Why each of them, one line per stage."""
    promises: tuple[Promise, ...]
    """What to book before any work starts, one per replica."""
    kinds: tuple[tuple[str, str], ...] = ()
    """(stage, why in one word), to be counted."""
    ttft_s: float = 0.0
    """Expected time to the first token."""

    @property
    def is_mixed(self) -> bool:
        """Whether no KV has to travel."""
        return self.prefill == self.decode


@dataclass(frozen=True, slots=True)
class _Start:
    """A replica for the prompt."""

    member: Member
    depth: int
    """Leading blocks that it holds."""
    num_uncached: int
    encoding: Encoding | None
    ttft_s: float

    @property
    def now(self) -> ReplicaSnapshot:
        return self.member.now


@dataclass(frozen=True, slots=True)
class _Way:
    """A whole path and its cost."""

    cost_s: float
    start: _Start
    decode: Member
    depth: int
    """Leading blocks that the decode side holds."""

    @property
    def rank(self) -> tuple[float, str, str]:
        return self.cost_s, self.start.now.replica_id, self.decode.now.replica_id


def choose_path(
    demand: Demand, fleet: Fleet, limits: RouterConfig, *, exclude: Collection[str] = frozenset()
) -> Path | Refusal:
    """Pick encoder, prefill and decode together, or refuse.

    Args:
        exclude: ids of replicas not to be used, for example those that just failed this request.
    """
    never = never_fits(demand, fleet)
    if never is not None:
        return never
    search = _Search(demand, fleet, limits, ~fleet.bits(exclude))
    best = min(search.ways(), key=lambda way: way.rank, default=None)
    return refuse(demand, fleet, limits, exclude=exclude) if best is None else search.path(best)


class _Search:
    """One decision under way."""

    def __init__(self, demand: Demand, fleet: Fleet, limits: RouterConfig, allowed: int) -> None:
        self._demand, self._fleet, self._limits, self._allowed = demand, fleet, limits, allowed
        self._vision, self._prefill, self._decode, self._mixed = (
            fleet.pool(demand.model, role) for role in ("vision", "prefill", "decode", "mixed")
        )
        self._stretch = stretch(demand, limits.reserve_output_tokens)
        self._encodings: dict[int, Encoding | None] = {}  # by number of leading pictures that are covered
        self._num_seen = 0

    def ways(self) -> Iterator[_Way]:
        """The paths that are worth a closer look; none when nothing has room."""
        for member, depth in self._likely(self._mixed, lambda m: has_room(m.now, self._demand, self._limits)):
            start = self._start(member, depth)
            if start is not None:
                yield self._local(start)
        partners = self._partners()
        is_short = self._demand.num_prompt_tokens <= self._limits.local_decode_tokens
        if not partners and not is_short:
            return
        starts: list[_Start] = []
        for member, depth in self._likely(self._prefill, lambda m: has_room(m.now, self._demand, self._limits)):
            start = self._start(member, depth)
            if start is not None:
                starts.append(start)
        starts.sort(key=lambda s: (s.ttft_s, s.now.replica_id))
        for start in starts[:_STARTS]:
            if is_short and has_room(start.now, self._demand, self._limits, answers=True):
                yield self._local(start)
            if partners:
                near = self._decode.nodes.get(start.now.node_id, 0) & self._allowed
                beside = islice(filter(self._can_answer, self._decode.walk(near)), _EACH)
                seen = {m.slot: m for m, _ in partners} | {m.slot: m for m in beside}
                depths = {m.slot: d for m, d in partners}
                for slot, member in seen.items():
                    yield self._handed_over(start, member, depths.get(slot))

    def _likely(self, pool: Pool, fits: Callable[[Member], bool]) -> list[tuple[Member, int]]:
        """(replica with room, leading blocks that it holds): the longest prefixes, and the least busy."""
        found: dict[int, tuple[Member, int]] = {}
        among = pool.mask & self._allowed
        if not among:
            return []
        for depth, mask in self._fleet.holders.levels(self._demand.chain, among, _LEVELS):
            for member in islice(filter(fits, pool.walk(mask)), _EACH):
                found[member.slot] = (member, depth)
        for member in islice(filter(fits, pool.walk(among)), _EACH):
            if member.slot not in found:
                found[member.slot] = (member, self._depth(member))
        return list(found.values())

    def _partners(self) -> list[tuple[Member, int]]:
        return self._likely(self._decode, self._can_answer)

    def _can_answer(self, member: Member) -> bool:
        return has_room(member.now, self._demand, self._limits)

    def _depth(self, member: Member) -> int:
        return self._fleet.holders.depth(self._demand.chain, member.slot)

    def _start(self, member: Member, depth: int) -> _Start | None:
        """None when its pictures cannot be encoded now."""
        self._num_seen += 1
        demand, replica = self._demand, member.now
        num_uncached = demand.num_prompt_tokens - depth * replica.block_size
        wait_s, encoding = queue_s(replica), None
        if demand.num_media:
            encoding = self._encoding(depth * replica.block_size)
            if encoding is None:
                return None
            wait_s = max(wait_s, encoding.wait_s + transfer_s(encoding.member.now, replica, encoding.num_tokens))
        return _Start(member, depth, num_uncached, encoding, wait_s + prefill_s(replica, num_uncached))

    def _encoding(self, num_cached: int) -> Encoding | None:
        """The encoder of the pictures that a cached prefix does not cover."""
        covered = sum(p.end <= num_cached for p in self._demand.pictures)
        if covered not in self._encodings:
            self._encodings[covered] = cheapest_encoder(
                self._demand, covered, self._vision, self._fleet.holders, self._limits, self._allowed
            )
        return self._encodings[covered]

    def _local(self, start: _Start) -> _Way:
        replica = start.now
        answer_s = decode_s(replica, self._stretch)
        stalled_s = stall_s(replica, prefill_s(replica, start.num_uncached))
        return _Way(start.ttft_s + answer_s + stalled_s, start, start.member, start.depth)

    def _handed_over(self, start: _Start, decode: Member, depth: int | None) -> _Way:
        depth = self._depth(decode) if depth is None else depth
        num_tokens = self._demand.num_prompt_tokens - depth * decode.now.block_size
        moved_s = transfer_s(start.now, decode.now, num_tokens)
        return _Way(start.ttft_s + moved_s + decode_s(decode.now, self._stretch), start, decode, depth)

    def path(self, way: _Way) -> Path:
        """What was found, with its reasons and promises."""
        demand, start = self._demand, way.start
        prefill, decode = start.now, way.decode.now
        reasons = ["vision none: no media"]
        promises: list[Promise] = []
        kinds: list[tuple[str, str]] = []
        if start.encoding is not None:
            reasons = [start.encoding.reason]
            promises.append(start.encoding.promise)
            kinds.append(("vision", start.encoding.kind))
        is_local = start.member is way.decode
        cached = f"{start.depth * prefill.block_size} of {demand.num_prompt_tokens} tokens cached"
        queue = f"{prefill.waiting_tokens} wait, first token in {start.ttft_s:.3f} s"
        seen = f"best of {self._num_seen}"
        blocks = own_blocks(decode, demand, self._limits, answers=True)
        room = f"needs {blocks} of {decode.free_blocks} free blocks"
        kinds.append(("prefill", "prefix" if start.depth else "load"))
        items = demand.chain[start.depth : start.depth + _MAX_ITEMS]
        if is_local:
            reasons.append(f"{prefill.role} {prefill.replica_id}: {cached}, {queue}, {seen}, {room}")
            promises.append(Promise(prefill.replica_id, blocks=blocks, tokens=start.num_uncached, items=items))
            kinds.append(("decode", "local"))
        else:
            own = own_blocks(prefill, demand, self._limits, answers=False)
            place = "the same node" if prefill.node_id == decode.node_id else "another node"
            held = f"{way.depth * decode.block_size} tokens held"
            reasons.append(f"prefill {prefill.replica_id}: {cached}, {queue}, {seen}")
            reasons.append(f"decode {decode.replica_id}: {decode.num_running} run, on {place}, {held}, {room}")
            promises.append(Promise(prefill.replica_id, blocks=own, tokens=start.num_uncached, items=items))
            items = demand.chain[way.depth : way.depth + _MAX_ITEMS]
            promises.append(Promise(decode.replica_id, blocks=blocks, items=items))
            kinds.append(("decode", "prefix" if way.depth else "load"))
        return Path(
            encoder=None if start.encoding is None else start.encoding.member.now.replica_id,
            prefill=prefill.replica_id,
            decode=decode.replica_id,
            reasons=tuple(reasons),
            promises=tuple(promises),
            kinds=tuple(kinds),
            ttft_s=start.ttft_s,
        )
