"""Which replicas serve a request: one decision for the whole path, with its reasons and what it takes of each.

Each way through the replicas has a cost in seconds (`policy.cost`), and the cheapest is taken. Only a few of many replicas
are looked at closely: those that hold most of the prompt or of its pictures, those with the least to do, and those on the
same node. What one replica holds of the prompt may be fetched for another. Ties go to the lower ids, so that the order of the snapshots does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Container, Iterator
from dataclasses import dataclass

from ernie_cluster.config.router import RouterConfig
from ernie_cluster.policy.admission import Need, Refusal, blocks_for, never_fits, refuse
from ernie_cluster.policy.cost import crowd_s, prefill_s, stall_s, transfer_s
from ernie_cluster.policy.encoding import Encoders, Encoding
from ernie_cluster.policy.fetching import Fetch, Offer, Sources
from ernie_cluster.policy.fleet import Fleet, Member, Pool
from ernie_cluster.policy.snapshot import Demand, Promise, ReplicaSnapshot

_LEVELS = 2
"""Lengths of cached prefix that are looked at, where a prompt is to be computed; one where it is only sent to."""
_EACH = 2
"""Replicas that are looked at for each of them, and of those with the least to do."""
_STARTS = 2
"""Best replicas for a prompt for which decode partners are looked for."""
_MAX_ITEMS = 64
"""Blocks of a prompt that a replica is expected to hold soon; more would cost more time than they are worth."""


@dataclass(frozen=True, slots=True)
class EncoderShare:
    """An encoder, and what it does for one request."""

    encoder: str
    media: tuple[int, ...]
    """Numbers of the pictures that are to be had from it."""
    wait_s: float = 0.0
    """Expected time until it has encoded the last of them."""


@dataclass(frozen=True, slots=True)
class Path:
    """The replicas of one request."""

    encoders: tuple[EncoderShare, ...]
    """Each picture is in one of them; () when the request has no media."""
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
    fetch: Fetch | None = None
    """What of the prompt comes to `prefill` from another replica's cache."""

    @property
    def encoder(self) -> str | None:
        """The first encoder, mostly the only one."""
        return self.encoders[0].encoder if self.encoders else None

    @property
    def is_mixed(self) -> bool:
        """Whether no KV has to travel."""
        return self.prefill == self.decode


@dataclass(slots=True)
class _Start:
    """A replica for the prompt."""

    member: Member
    depth: int
    """Leading blocks that it holds."""
    num_uncached: int
    """Tokens that are to be computed."""
    encodings: tuple[Encoding, ...]
    ttft_s: float
    prefill_s: float
    cost_s: float
    """The time to the first token, and what others wait for it."""
    fetch: Fetch | None


@dataclass(slots=True)
class _Partner:
    """A replica for the answer."""

    now: ReplicaSnapshot
    depth: int
    answer_s: float


_Way = tuple[float, str, str, _Start, _Partner | None]
"""Cost in seconds, the ids of both replicas, and the replicas; None where the first does all. Ids settle ties."""


def choose_path(
    demand: Demand,
    fleet: Fleet,
    limits: RouterConfig,
    *,
    exclude: Collection[str] = frozenset(),
    parted: Collection[str] = frozenset(),
) -> Path | Refusal:
    """Pick encoder, prefill and decode together, or refuse.

    Args:
        exclude: ids of replicas not to be used, for example those that just failed this request.
        parted: those of them that may still be asked for a prefix while they drain.
    """
    never = never_fits(demand, fleet)
    if never is not None:
        return never
    search = _Search(demand, fleet, limits, ~fleet.bits(exclude), fleet.bits(parted))
    best = min(search.ways(), default=None)
    return refuse(demand, fleet, limits, exclude=exclude) if best is None else search.path(best)


class _Search:
    """One decision under way."""

    def __init__(self, demand: Demand, fleet: Fleet, limits: RouterConfig, allowed: int, parted: int) -> None:
        self._demand, self._fleet, self._allowed = demand, fleet, allowed
        self._need = Need.of(demand, limits)
        self._is_short = demand.num_prompt_tokens <= limits.local_decode_tokens
        self._stretch = self._need.total_tokens - self._need.prompt_tokens
        if demand.num_media:
            vision = fleet.pool(demand.model, "vision")
            self._encoders = Encoders(demand, vision, fleet.holders, self._need, allowed)
        self._prefill, self._decode = fleet.pool(demand.model, "prefill"), fleet.pool(demand.model, "decode")
        self._mixed = fleet.pool(demand.model, "mixed")
        self._trail = fleet.holders.trail(demand.chain)
        self._sources: Sources | None = None
        if limits.fetch_prefixes and limits.policy == "cost":
            self._sources = Sources(self._trail, (self._prefill, self._mixed, self._decode), allowed, parted)
        self._num_seen = 0
        self._least_s = math.inf

    def ways(self) -> Iterator[_Way]:
        """The paths that are worth a closer look; none when nothing has room."""
        if self._demand.num_media and not self._encoders.have_room:
            return
        yield from self._handovers()
        likely = self._likely(self._mixed, _LEVELS)
        self._num_seen += len(likely)
        if any(self._may_win(member) for member, _ in likely):
            for i, start in enumerate(self._starts(likely)):
                if self._may_win(start.member):
                    yield self._local(self._with_prefix(start) if i < _STARTS else start)

    def _may_win(self, member: Member) -> bool:
        """Whether a replica that does all could be better than the best so far, if there were no prompt to read."""
        return member.wait_s + self._stretch * member.pace_s <= self._least_s

    def _handovers(self) -> Iterator[_Way]:
        """Those that begin on a prefill replica."""
        partners = {member.slot: self._partner(member, depth) for member, depth in self._likely(self._decode, 1)}
        if not partners and not self._is_short:
            return
        likely = self._likely(self._prefill, _LEVELS)
        self._num_seen += len(likely)
        starts = self._starts(likely)
        starts[:_STARTS] = map(self._with_prefix, starts[:_STARTS])
        least_s = min((partner.answer_s for partner in partners.values()), default=math.inf)
        for start in sorted(starts, key=_cost_of)[:_STARTS]:
            if self._is_short and self._need.can_answer(start.member.now):
                yield self._local(start)
            if start.cost_s + least_s <= self._least_s:
                for partner in (*partners.values(), *self._beside(start, partners)):
                    if start.cost_s + partner.answer_s <= self._least_s:
                        yield self._handed_over(start, partner)

    def _beside(self, start: _Start, known: Container[int]) -> Iterator[_Partner]:
        """On the same node; not those that would be too slow even if nothing had to be sent."""
        near = self._decode.nodes.get(start.member.now.node_id, 0) & self._allowed
        for member in self._first(self._decode, near):
            if member.slot not in known and start.cost_s + self._stretch * member.pace_s <= self._least_s:
                yield self._partner(member, self._trail.depth(member.slot))

    def _likely(self, pool: Pool, num_levels: int) -> list[tuple[Member, int]]:
        """(replica with room, leading blocks that it holds): the longest prefixes, and the least busy."""
        among = pool.mask & self._allowed
        if not among:
            return []
        found: dict[int, tuple[Member, int]] = {}
        for depth, mask in self._trail.levels(among, num_levels):
            for member in self._first(pool, mask):
                found[member.slot] = (member, depth)
        for member in self._first(pool, among):
            if member.slot not in found:
                found[member.slot] = (member, self._trail.depth(member.slot))
        return list(found.values())

    def _first(self, pool: Pool, among: int) -> list[Member]:
        """The best few with room."""
        return pool.best(among, self._need.fits, _EACH)

    def _starts(self, likely: list[tuple[Member, int]]) -> list[_Start]:
        """For the prompt, those with the least to do first."""
        return sorted([self._start(member, depth) for member, depth in likely], key=_wait_of)

    def _with_prefix(self, start: _Start) -> _Start:
        """The same, or with the longest prefix from elsewhere where that is faster."""
        offer = self._sources.best(start.member.now, start.depth) if self._sources else None
        if offer is None:
            return start
        fetched = self._start(start.member, start.depth, offer)
        return fetched if fetched.ttft_s < start.ttft_s else start

    def _start(self, member: Member, depth: int, offer: Offer | None = None) -> _Start:
        """On this replica, with a prefix from elsewhere or without."""
        replica = member.now
        fetch, fetch_s = (None, 0.0) if offer is None else (offer.fetch, offer.cost_s)
        num_cached = (depth if fetch is None else fetch.num_blocks) * replica.block_size
        wait_s = max(member.wait_s, fetch_s)
        encodings: tuple[Encoding, ...] = ()
        if self._demand.num_media:
            encodings = self._encoders.after(num_cached)
            for encoding in encodings:  # once it is known what is here
                moved_s = transfer_s(encoding.member.now, replica, encoding.num_tokens)
                wait_s = max(wait_s, fetch_s + encoding.wait_s + moved_s)
        num_uncached = self._demand.num_prompt_tokens - num_cached
        read_s = prefill_s(replica, num_uncached)
        ttft_s = wait_s + read_s
        return _Start(member, depth, num_uncached, encodings, ttft_s, read_s, ttft_s + crowd_s(read_s), fetch)

    def _partner(self, member: Member, depth: int) -> _Partner:
        return _Partner(member.now, depth, self._stretch * member.pace_s)

    def _local(self, start: _Start) -> _Way:
        member = start.member
        cost_s = start.cost_s + self._stretch * member.pace_s + stall_s(member.now, start.prefill_s)
        return self._way(cost_s, start, None)

    def _handed_over(self, start: _Start, partner: _Partner) -> _Way:
        num_missing = self._demand.num_prompt_tokens - partner.depth * partner.now.block_size
        moved_s = transfer_s(start.member.now, partner.now, num_missing)
        return self._way(start.cost_s + moved_s + partner.answer_s, start, partner)

    def _way(self, cost_s: float, start: _Start, partner: _Partner | None) -> _Way:
        self._least_s = min(self._least_s, cost_s)
        replica_id = start.member.now.replica_id
        return cost_s, replica_id, partner.now.replica_id if partner else replica_id, start, partner

    def path(self, way: _Way) -> Path:
        """What was found, with its reasons and promises."""
        demand, need = self._demand, self._need
        _, _, _, start, partner = way
        prefill, fetch = start.member.now, start.fetch
        reasons = [encoding.reason for encoding in start.encodings] or ["vision none: no media"]
        promises = [encoding.promise for encoding in start.encodings]
        kinds = [("vision", encoding.kind) for encoding in start.encodings]
        blocks = blocks_for(need.prompt_tokens if partner else need.total_tokens, prefill)
        why = (
            f"{prefill.role} {prefill.replica_id}: {start.depth * prefill.block_size} of {demand.num_prompt_tokens} tokens "
            f"cached, {prefill.waiting_tokens} wait, first token in {start.ttft_s:.3f} s, best of {self._num_seen}"
        )
        if fetch is not None:
            why += f", up to token {fetch.num_blocks * prefill.block_size} from {fetch.source}"
        items = demand.chain[start.depth : start.depth + _MAX_ITEMS]
        promises.append(Promise(prefill.replica_id, blocks=blocks, tokens=start.num_uncached, items=items))
        kinds.append(("prefill", "fetched" if fetch else "prefix" if start.depth else "load"))
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
            encoders=tuple(EncoderShare(e.member.now.replica_id, tuple(e.media), e.wait_s) for e in start.encodings),
            prefill=prefill.replica_id,
            decode=partner.now.replica_id if partner else prefill.replica_id,
            reasons=tuple(reasons),
            promises=tuple(promises),
            kinds=tuple(kinds),
            ttft_s=start.ttft_s,
            fetch=fetch,
        )


def _wait_of(start: _Start) -> tuple[float, str]:
    return start.ttft_s - start.prefill_s, start.member.now.replica_id


def _cost_of(start: _Start) -> tuple[float, str]:
    return start.cost_s, start.member.now.replica_id
