"""Which vision replica encodes the pictures of a request.

One that holds them already does nothing. A picture that nobody holds goes home: to the encoder that the ring says, so that
it is found there the next time. Strangers may take it when the home is busy, but count part of its encoding on top, which
will be done again one day.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import islice

from ernie_cluster.config.cluster import RouterConfig
from ernie_cluster.policy.admission import Need, Refusal, refuse_encoding
from ernie_cluster.policy.cost import encode_s, queue_s
from ernie_cluster.policy.fleet import Fleet, Member, Pool
from ernie_cluster.policy.holders import Holders
from ernie_cluster.policy.snapshot import Demand, Picture, Promise

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


def cheapest_encoder(
    demand: Demand, num_covered: int, vision: Pool, holders: Holders, need: Need, allowed: int
) -> Encoding | None:
    """The encoder with the least to do for the pictures of a request, or None where none has room.

    Args:
        num_covered: leading pictures that need no encoding. With all of them covered there still is an encoder: a cache
            may have lost by then what it told.
        allowed: the replicas that may be chosen.
    """
    among = vision.mask & allowed
    pictures = demand.pictures[num_covered:]
    masks = [holders.of(picture.item) for picture in pictures]
    found: dict[int, tuple[Member, int]] = {}  # (encoder, its place among the homes)
    if demand.pictures:
        first = (pictures or demand.pictures)[0]
        for slot in islice(vision.ring.homes(first.item), _REACH):
            if slot in found or not among >> slot & 1:
                continue
            member = vision.member(slot)
            if need.fits(member.now):
                found[slot] = (member, len(found))
                if len(found) == _HOMES:
                    break
    for mask in {*masks, among}:
        for member in vision.best(mask & among, need.fits, _EACH):
            found.setdefault(member.slot, (member, _HOMES))
    options = [_weighed(demand, pictures, masks, member, place) for member, place in found.values()]
    best = min(options, default=None)
    return None if best is None else _encoding(demand, pictures, masks, *found[best[2]])


def _weighed(
    demand: Demand, pictures: tuple[Picture, ...], masks: list[int], member: Member, place: int
) -> tuple[float, tuple[float, str], int]:
    """(cost in seconds, rank, slot)."""
    num_pictures, num_tokens = demand.num_media, demand.media_tokens
    if demand.pictures:
        num_pictures = num_tokens = 0
        for picture, mask in zip(pictures, masks, strict=True):  # one that comes twice counts twice, everywhere
            if not mask >> member.slot & 1:
                num_pictures += 1
                num_tokens += picture.num_tokens
    work_s = encode_s(member.now, num_pictures, num_tokens)
    stray = _STRAY_WEIGHT * place / _HOMES if demand.pictures else 0.0
    return queue_s(member.now) + (1 + stray) * work_s, member.rank, member.slot


def _encoding(demand: Demand, pictures: tuple[Picture, ...], masks: list[int], member: Member, place: int) -> Encoding:
    missing = {p.item: p for p, mask in zip(pictures, masks, strict=True) if not mask & member.bit}
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
    pool = fleet.pool(demand.model, "vision")
    found = cheapest_encoder(demand, 0, pool, fleet.holders, Need.of(demand, limits), ~fleet.bits(exclude))
    if found is None:
        return refuse_encoding(demand, fleet, limits, exclude=exclude)
    return found.promise
