"""How several encoders share the pictures of one request: each picture goes where it is done first.

An encoder that holds a picture sends it at once, whatever waits there; so what one has and the others have not is fetched
from it, and what nobody has is spread, where that is faster than to have it all from one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ernie_cluster.policy.cost import encode_s
from ernie_cluster.policy.fleet import Member
from ernie_cluster.policy.snapshot import Picture

SHARE_S = 0.002
"""A further encoder for a request, beside its work."""


@dataclass(slots=True)
class Candidate:
    """An encoder that comes into question."""

    member: Member
    place: int
    """Among the homes of the first picture; 0 is its own."""
    begin_s: float
    """Until it begins with a picture that it does not hold."""
    weight: float
    """Of its work: more away from home."""


@dataclass(slots=True)
class Share:
    """What one of them does."""

    candidate: Candidate
    bit: int
    begin_s: float
    """Until it begins with a further picture that it does not hold: no time, once it has one."""
    cost_s: float = 0.0
    """Until it is done, its work weighed; of one that has nothing to do, what it takes to have it as well."""
    wait_s: float = 0.0
    """Until it is done."""
    num_tokens: int = 0
    """Of pictures that it does not hold yet."""
    pictures: tuple[int, ...] = ()
    """Their numbers among those that are shared."""

    def add(self, number: int, num_tokens: int, work_s: float, cost_s: float) -> None:
        """Give it a further picture, of so many tokens if it does not hold it, after which its cost is this."""
        self.cost_s = cost_s
        self.pictures += (number,)
        if work_s:
            self.wait_s += self.begin_s + work_s
            self.num_tokens += num_tokens
            self.begin_s = 0.0


def shared(candidates: Sequence[Candidate], pictures: Sequence[tuple[Picture, int]]) -> list[Share]:
    """Each picture, in order, to whom would be done with it first; ties go to the better rank.

    Args:
        candidates: the sooner the last ones are done, the less of the others is looked at.
        pictures: each with the set of those who hold it.
    """
    shares = [Share(candidate, candidate.member.bit, candidate.begin_s) for candidate in candidates]
    given: dict[int, int] = {}  # by item: who holds it, or was given it
    for number, (picture, holders) in enumerate(pictures):
        holders |= given.get(picture.item, 0)
        best_s, chosen, least_s = math.inf, shares[0], 0.0
        for share in reversed(shares):
            cost_s, work_s = share.cost_s, 0.0
            if not holders & share.bit:
                cost_s += share.begin_s
                if cost_s > best_s:
                    continue
                work_s = encode_s(share.candidate.member.now, 1, picture.num_tokens)
                cost_s += share.candidate.weight * work_s
            if cost_s < best_s or (cost_s == best_s and share.candidate.member.rank < chosen.candidate.member.rank):
                best_s, chosen, least_s = cost_s, share, work_s
        chosen.add(number, picture.num_tokens, least_s, best_s)
        given[picture.item] = holders | chosen.bit
        if not number:
            for share in shares:
                share.cost_s = share.cost_s if share.pictures else SHARE_S
    return [share for share in shares if share.pictures]
