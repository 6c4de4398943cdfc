"""Which replicas serve a request: one decision for the whole path, with its reasons and what it takes of each.

Each way through the replicas has a cost in seconds (`policy.cost`), and the cheapest is taken. Only a few of many replicas
are looked at closely: those that hold most of the prompt or of its pictures, those with the least to do, and those on the
same node. Ties go to the lower ids, so that the order of the snapshots does not matter.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from ernie_cluster.config.cluster import RouterConfig
from ernie_cluster.policy.admission import Need, Refusal, blocks_for, never_fits, refuse
from ernie_cluster.policy.cost import decode_s, prefill_s, queue_s, stall_s, transfer_s
from ernie_cluster.policy.encoding import Encoders, Encoding
from ernie_cluster.policy.fleet import Fleet, Member, Pool
from ernie_cluster.policy.snapshot import Demand, Promise, ReplicaSnapshot

_LEVELS = 2
"""Lengths of cached prefix that are looked at."""
_EACH = 2
"""Replicas that are looked at for each of them, and of those with the least to do."""
_STARTS = 2
"""Best replicas for a prompt for which decode partners are looked for."""
_MAX_ITEMS = 64
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


@dataclass(slots=True)
class _Start:
    """A replica for the prompt."""

    now: ReplicaSnapshot
    depth: int
    """Leading blocks that it holds."""
    num_uncached: int
    encoding: Encoding | None
    ttft_s: float


@dataclass(slots=True)
class _Partner:
    """A replica for the answer."""

    now: ReplicaSnapshot
    depth: int
    num_uncached: int
    answer_s: float


_Way = tuple[float, str, str, _Start, _Partner | None]
"""Cost in seconds, the ids of both replicas, and the replicas; None where the first does all. Ids settle ties."""


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
    best = min(search.ways(), default=None)
    return refuse(demand, fleet, limits, exclude=exclude) if best is None else search.path(best)


class _Search:
    """One decision under way."""

    def __init__(self, demand: Demand, fleet: Fleet, limits: RouterConfig, allowed: int) -> None:
        self._demand, self._fleet, self._allowed = demand, fleet, allowed
        self._need = Need.of(demand, limits)
        self._is_short = demand.num_prompt_tokens <= limits.local_decode_tokens
        self._stretch = self._need.total_tokens - self._need.prompt_tokens
        if demand.num_media:
            vision = fleet.pool(demand.model, "vision")
            self._encoders = Encoders(demand, vision, fleet.holders, self._need, allowed)
        self._num_seen = 0

    def ways(self) -> Iterator[_Way]:
        """The paths that are worth a closer look; none when nothing has room."""
        for start in self._starts(self._fleet.pool(self._demand.model, "mixed")):
            yield self._local(start)
        decode = self._fleet.pool(self._demand.model, "decode")
        partners = {member.slot: self._partner(member, depth) for member, depth in self._likely(decode)}
        if not partners and not self._is_short:
            return
        starts = self._starts(self._fleet.pool(self._demand.model, "prefill"))
        starts.sort(key=lambda s: (s.ttft_s, s.now.replica_id))
        for start in starts[:_STARTS]:
            if self._is_short and self._need.can_answer(start.now):
                yield self._local(start)
            if partners:
                near = decode.nodes.get(start.now.node_id, 0) & self._allowed
                beside = [m for m in self._first(decode, near) if m.slot not in partners]
                yield from (self._handed_over(start, partner) for partner in partners.values())
                yield from (self._handed_over(start, self._partner(m, self._depth(m))) for m in beside)

    def _likely(self, pool: Pool) -> list[tuple[Member, int]]:
        """(replica with room, leading blocks that it holds): the longest prefixes, and the least busy."""
        among = pool.mask & self._allowed
        if not among:
            return []
        found: dict[int, tuple[Member, int]] = {}
        for depth, mask in self._fleet.holders.levels(self._demand.chain, among, _LEVELS):
            for member in self._first(pool, mask):
                found[member.slot] = (member, depth)
        for member in self._first(pool, among):
            if member.slot not in found:
                found[member.slot] = (member, self._depth(member))
        return list(found.values())

    def _first(self, pool: Pool, among: int) -> list[Member]:
        """The best few with room."""
        return pool.best(among, self._need.fits, _EACH)

    def _depth(self, member: Member) -> int:
        return self._fleet.holders.depth(self._demand.chain, member.slot)

    def _starts(self, pool: Pool) -> list[_Start]:
        """Replicas for the prompt; none when its pictures cannot be encoded now."""
        found = []
        for member, depth in self._likely(pool):
            replica, num_cached = member.now, depth * member.now.block_size
            num_uncached = self._demand.num_prompt_tokens - num_cached
            wait_s, encoding = queue_s(replica), None
            if self._demand.num_media:
                encoding = self._encoding(num_cached)
                if encoding is None:
                    return []
                moved_s = transfer_s(encoding.member.now, replica, encoding.num_tokens)
                wait_s = max(wait_s, encoding.wait_s + moved_s)
            found.append(_Start(replica, depth, num_uncached, encoding, wait_s + prefill_s(replica, num_uncached)))
        self._num_seen += len(found)
        return found

    def _encoding(self, num_cached: int) -> Encoding | None:
        """The encoder of the pictures that a cached prefix does not cover."""
        return self._encoders.cheapest(sum(p.end <= num_cached for p in self._demand.pictures))

    def _partner(self, member: Member, depth: int) -> _Partner:
        num_uncached = self._demand.num_prompt_tokens - depth * member.now.block_size
        return _Partner(member.now, depth, num_uncached, decode_s(member.now, self._stretch))

    def _local(self, start: _Start) -> _Way:
        replica = start.now
        stalled_s = stall_s(replica, prefill_s(replica, start.num_uncached))
        cost_s = start.ttft_s + decode_s(replica, self._stretch) + stalled_s
        return cost_s, replica.replica_id, replica.replica_id, start, None

    def _handed_over(self, start: _Start, partner: _Partner) -> _Way:
        moved_s = transfer_s(start.now, partner.now, partner.num_uncached)
        cost_s = start.ttft_s + moved_s + partner.answer_s
        return cost_s, start.now.replica_id, partner.now.replica_id, start, partner

    def path(self, way: _Way) -> Path:
        """What was found, with its reasons and promises."""
        demand, need = self._demand, self._need
        _, _, _, start, partner = way
        prefill, encoding = start.now, start.encoding
        reasons = [encoding.reason if encoding else "vision none: no media"]
        promises = [encoding.promise] if encoding else []
        kinds = [("vision", encoding.kind)] if encoding else []
        blocks = blocks_for(need.prompt_tokens if partner else need.total_tokens, prefill)
        why = (
            f"{prefill.role} {prefill.replica_id}: {start.depth * prefill.block_size} of {demand.num_prompt_tokens} tokens "
            f"cached, {prefill.waiting_tokens} wait, first token in {start.ttft_s:.3f} s, best of {self._num_seen}"
        )
        items = demand.chain[start.depth : start.depth + _MAX_ITEMS]
        promises.append(Promise(prefill.replica_id, blocks=blocks, tokens=start.num_uncached, items=items))
        kinds.append(("prefill", "prefix" if start.depth else "load"))
        if partner is None:
            reasons.append(f"{why}, needs {blocks} of {prefill.free_blocks} free blocks")
            kinds.append(("decode", "local"))
        else:
            decode = partner.now
            blocks = blocks_for(need.total_tokens, decode)
            place = "the same node" if prefill.node_id == decode.node_id else "another node"
            reasons += [
                why,
                f"decode {decode.replica_id}: {decode.num_running} run, on {place}, {partner.depth * decode.block_size} "
                f"tokens held, needs {blocks} of {decode.free_blocks} free blocks",
            ]
            items = demand.chain[partner.depth : partner.depth + _MAX_ITEMS]
            promises.append(Promise(decode.replica_id, blocks=blocks, items=items))
            kinds.append(("decode", "prefix" if partner.depth else "load"))
        return Path(
            encoder=encoding.member.now.replica_id if encoding else None,
            prefill=prefill.replica_id,
            decode=partner.now.replica_id if partner else prefill.replica_id,
            reasons=tuple(reasons),
            promises=tuple(promises),
            kinds=tuple(kinds),
            ttft_s=start.ttft_s,
        )
