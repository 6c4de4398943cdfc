"""Which vision replica encodes the pictures of a request, or which of them share these (`sharing`).

One that holds them already does nothing. A picture that nobody holds goes home: to the encoder that the ring says, so that
it is found there the next time. Strangers may take it when the home is busy, but count part of its encoding on top, which
will be done again one day.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import islice
from operator import and_, or_

from ernie_cluster.config.router import RouterConfig
from ernie_cluster.policy.admission import Need, Refusal, refuse_encoding
from ernie_cluster.policy.cost import encode_s
from ernie_cluster.policy.fleet import Fleet, Member, Pool
from ernie_cluster.policy.holders import Holders
from ernie_cluster.policy.sharing import SHARE_S, Candidate, shared
from ernie_cluster.policy.snapshot import Demand, Picture, Promise

_HOMES = 2
"""A picture's home, and where it goes when that is full."""
_EACH = 2
_HOLDERS = 4
"""Encoders with some of the pictures that are all looked at; of more, the best of those with the first, all or any."""
_REACH = 64
"""Points of the ring that are passed in search of an encoder with room."""
_STRAY_WEIGHT = 0.5
"""Of the encoding, away from home."""


@dataclass(slots=True)
class Encoding:
    """An encoder for some pictures."""

    member: Member
    place: int
    """Among the homes of the first of them; 0 is its own."""
    wait_s: float
    """Until the last of them is encoded."""
    num_tokens: int
    """Of those that it does not hold yet, and no others."""
    uncovered: Sequence[tuple[Picture, int]]
    """What is to be had from it, each with who holds it."""
    media: Sequence[int]
    """The numbers of the pictures that are to be had from it, those that a cached prefix covers among them."""

    @property
    def items(self) -> tuple[int, ...]:
        """What it will hold then, and does not yet."""
        bit = self.member.bit
        return tuple(dict.fromkeys(picture.item for picture, mask in self.uncovered if not mask & bit))

    @property
    def kind(self) -> str:
        """Why, in one word."""
        if not self.num_tokens:
            return "cached"
        return "load" if self.place else "home"

    @property
    def promise(self) -> Promise:
        """What to book."""
        return Promise(self.member.now.replica_id, media_tokens=self.num_tokens, items=self.items)

    @property
    def reason(self) -> str:
        """Why, in a line."""
        now = self.member.now
        return f"vision {now.replica_id}: {self.kind}, {self.num_tokens} tokens to encode, {now.waiting_tokens} wait"


class Encoders:
    """The encoders that come into question for the pictures of one request.

    Args:
        need: of that request.
        allowed: the replicas that may be chosen.
    """

    def __init__(self, demand: Demand, vision: Pool, holders: Holders, need: Need, allowed: int) -> None:
        self._demand = demand
        self._ends = [picture.end for picture in demand.pictures]
        self._held = [(picture, holders.of(picture.item)) for picture in demand.pictures]
        self._chosen: dict[int, tuple[Encoding, ...]] = {}  # by number of leading pictures that are covered
        among = vision.mask & allowed
        self._known = 0
        homes: dict[Member, int] = {}
        likely = vision.best(among, need.fits, _EACH)
        if self._held:
            homes = self._homes(vision, need, among)
            masks = [mask & among for _, mask in self._held]
            self._known = reduce(or_, masks)
            if self._known.bit_count() <= _HOLDERS:
                likely += vision.best(self._known, need.fits, _HOLDERS)
            else:
                for mask in (masks[0], reduce(and_, masks), self._known):
                    likely += vision.best(mask, need.fits, _EACH)
        places = homes | {member: _HOMES for member in likely if member not in homes}
        stray_weight = _STRAY_WEIGHT / _HOMES if self._held else 0.0
        self._candidates = [
            Candidate(member, place, member.wait_s, 1 + stray_weight * place) for member, place in places.items()
        ]

    def _homes(self, vision: Pool, need: Need, among: int) -> dict[Member, int]:
        """Those of the first picture, in order: a chat that goes on stays with the encoder that has seen it."""
        homes: dict[Member, int] = {}
        for slot in islice(vision.ring.homes(self._demand.pictures[0].item), _REACH):
            if among >> slot & 1:
                member = vision.member(slot)
                if member not in homes and need.fits(member.now):
                    homes[member] = len(homes)
                    if len(homes) == _HOMES:
                        break
        return homes

    @property
    def have_room(self) -> bool:
        """Whether any of them can take the pictures now."""
        return bool(self._candidates)

    def after(self, num_cached: int) -> tuple[Encoding, ...]:
        """The encoders of what a prefix of so many cached tokens does not cover; () where none has room.

        With all pictures covered there still is an encoder: a cache may have lost by then what it told.
        """
        num_covered = bisect_right(self._ends, num_cached)
        if num_covered not in self._chosen:
            cost_s, one = self._cheapest(num_covered)
            may_share = len(self._held) - num_covered > 1 and SHARE_S < cost_s < math.inf
            self._chosen[num_covered] = (self._shared(num_covered, cost_s) if may_share else ()) or one
        return self._chosen[num_covered]

    def _cheapest(self, num_covered: int) -> tuple[float, tuple[Encoding, ...]]:
        """(cost in seconds, the one with the least to do)."""
        demand, uncovered = self._demand, self._held[num_covered:]
        once = list({picture.item: (picture.num_tokens, mask) for picture, mask in uncovered}.values())
        everything = (
            (len(once), sum(size for size, _ in once)) if self._held else (demand.num_media, demand.media_tokens)
        )
        best, chosen = (math.inf, (math.inf, "")), None
        for candidate in reversed(self._candidates):  # the last ones hold some, or are idle: few can be better
            member, (num_pictures, num_tokens) = candidate.member, everything
            if self._known & member.bit:
                missing = [size for size, mask in once if not mask & member.bit]
                num_pictures, num_tokens = len(missing), sum(missing)
            begin_s = candidate.begin_s if num_pictures else 0.0  # what is cached waits for nobody
            if begin_s > best[0]:
                continue
            work_s = encode_s(member.now, num_pictures, num_tokens)
            cost = begin_s + candidate.weight * work_s, member.rank
            if cost < best:
                best, chosen = cost, (member, candidate.place, begin_s + work_s, num_tokens)
        if chosen is None:
            return math.inf, ()
        return best[0], (Encoding(*chosen, uncovered, range(demand.num_media)),)

    def _shared(self, num_covered: int, below_s: float) -> tuple[Encoding, ...]:
        """Several of them, if that costs less; the first takes what is covered."""
        uncovered = self._held[num_covered:]
        shares = shared(self._candidates, uncovered)
        if len(shares) < 2 or max(share.cost_s for share in shares) >= below_s:
            return ()
        found, covered = [], range(num_covered)
        for share in shares:
            candidate, own = share.candidate, [uncovered[i] for i in share.pictures]
            media = (*covered, *(num_covered + i for i in share.pictures))
            covered = range(0)
            found.append(Encoding(candidate.member, candidate.place, share.wait_s, share.num_tokens, own, media))
        return tuple(found)


def choose_encoder(
    demand: Demand, fleet: Fleet, limits: RouterConfig, *, exclude: Collection[str] = frozenset()
) -> Promise | Refusal:
    """Pick the vision replica for pictures that belong to no prompt, or refuse; what is to be booked names it.

    Args:
        exclude: as of `choose_path`.
    """
    pool, need = fleet.pool(demand.model, "vision"), Need.of(demand, limits)
    found = Encoders(demand, pool, fleet.holders, need, ~fleet.bits(exclude)).after(0)
    return found[0].promise if found else refuse_encoding(demand, fleet, limits, exclude=exclude)
