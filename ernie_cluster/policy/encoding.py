"""Which vision replica encodes the pictures of a request.

One that holds them already does nothing. A picture that nobody holds goes home: to the encoder that the ring says, so that
it is found there the next time. Strangers may take it when the home is busy, but count part of its encoding on top, which
will be done again one day.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import reduce
from itertools import islice
from operator import and_, or_

from ernie_cluster.config.cluster import RouterConfig
from ernie_cluster.policy.admission import Need, Refusal, refuse_encoding
from ernie_cluster.policy.cost import encode_s, queue_s
from ernie_cluster.policy.fleet import Fleet, Member, Pool
from ernie_cluster.policy.holders import Holders
from ernie_cluster.policy.snapshot import Demand, Promise

_HOMES = 2
"""A picture's home, and where it goes when that is full."""
_EACH = 2
_REACH = 64
"""Points of the ring that are passed in search of an encoder with room."""
_STRAY_WEIGHT = 0.5
"""Of the encoding, away from home."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """An encoder for some pictures."""

    member: Member
    wait_s: float
    """Until the last of them is encoded."""
    num_pictures: int
    """Of these it holds none yet."""
    num_tokens: int
    """Of those, and no others."""
    kind: str
    """Why, in one word."""
    items: tuple[int, ...]
    """It will hold them then."""

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
        self._masks = [holders.of(picture.item) for picture in demand.pictures]
        self._found: dict[int, tuple[Member, int]] = {}  # by slot: (encoder, its place among the homes)
        self._chosen: dict[int, Encoding | None] = {}  # by number of leading pictures that are covered
        among = vision.mask & allowed
        wanted = {among}
        if self._masks:
            self._find_homes(vision, need, among)
            wanted |= {self._masks[0], reduce(and_, self._masks), reduce(or_, self._masks)}
        for mask in wanted:
            for member in vision.best(mask & among, need.fits, _EACH):
                self._found.setdefault(member.slot, (member, _HOMES))
        self._missing = {slot: self._tails(1 << slot) for slot in self._found}

    def _find_homes(self, vision: Pool, need: Need, among: int) -> None:
        """Those of the first picture: a chat that goes on stays with the encoder that has seen it."""
        for slot in islice(vision.ring.homes(self._demand.pictures[0].item), _REACH):
            if slot not in self._found and among >> slot & 1:
                member = vision.member(slot)
                if need.fits(member.now):
                    self._found[slot] = (member, len(self._found))
                    if len(self._found) == _HOMES:
                        return

    def cheapest(self, num_covered: int) -> Encoding | None:
        """The one with the least to do, or None where none has room.

        Args:
            num_covered: leading pictures that need no encoding. With all of them covered there still is an encoder: a
                cache may have lost by then what it told.
        """
        if num_covered not in self._chosen:
            best = min((self._weighed(num_covered, *found) for found in self._found.values()), default=None)
            self._chosen[num_covered] = None if best is None else self._encoding(num_covered, *self._found[best[2]])
        return self._chosen[num_covered]

    def _weighed(self, num_covered: int, member: Member, place: int) -> tuple[float, tuple[float, str], int]:
        """(cost in seconds, rank, slot)."""
        work_s = encode_s(member.now, *self._missing[member.slot][num_covered])
        stray = _STRAY_WEIGHT * place / _HOMES if self._masks else 0.0
        return queue_s(member.now) + (1 + stray) * work_s, member.rank, member.slot

    def _tails(self, bit: int) -> list[tuple[int, int]]:
        """(pictures, tokens) that a replica has to encode, by number of leading pictures that are covered.

        One that comes twice counts twice, everywhere.
        """
        num_pictures = num_tokens = 0
        if not self._masks:
            return [(self._demand.num_media, self._demand.media_tokens)]
        tails = [(0, 0)]
        for picture, mask in zip(reversed(self._demand.pictures), reversed(self._masks), strict=True):
            if not mask & bit:
                num_pictures += 1
                num_tokens += picture.num_tokens
            tails.append((num_pictures, num_tokens))
        tails.reverse()
        return tails

    def _encoding(self, num_covered: int, member: Member, place: int) -> Encoding:
        demand = self._demand
        uncovered = zip(demand.pictures[num_covered:], self._masks[num_covered:], strict=True)
        missing = {p.item: p for p, mask in uncovered if not mask & member.bit}
        num_pictures, num_tokens = len(missing), sum(p.num_tokens for p in missing.values())
        kind = "load" if place else "home"
        if not demand.pictures:
            num_pictures, num_tokens = demand.num_media, demand.media_tokens
        elif not missing:
            kind = "cached"
        wait_s = queue_s(member.now) + encode_s(member.now, num_pictures, num_tokens)
        return Encoding(member, wait_s, num_pictures, num_tokens, kind, tuple(missing))


def choose_encoder(
    demand: Demand, fleet: Fleet, limits: RouterConfig, *, exclude: Collection[str] = frozenset()
) -> Promise | Refusal:
    """Pick the vision replica for pictures that belong to no prompt, or refuse; what is to be booked names it.

    Args:
        exclude: as of `choose_path`.
    """
    pool, need = fleet.pool(demand.model, "vision"), Need.of(demand, limits)
    found = Encoders(demand, pool, fleet.holders, need, ~fleet.bits(exclude)).cheapest(0)
    if found is None:
        return refuse_encoding(demand, fleet, limits, exclude=exclude)
    return found.promise
