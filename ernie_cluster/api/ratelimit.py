"""How much of something a key may use a minute: a token bucket as a value, and all buckets of one key.

The bucket reads no clock; times are seconds of any clock that does not run backwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from ernie_cluster.config.keys import Limited
from ernie_cluster.errors import InvalidRequest, RateLimited

Amounts = Mapping[Limited, int]
"""How much of each; not negative."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Holds up to `per_minute` units and gains as many a minute; below 0 is debt.

    In any T seconds that end with a take that was covered, at most per_minute * (1 + T / 60) units are used.
    """

    per_minute: int
    """At least 1."""
    level: float
    at_s: float
    """The time at which it held `level`."""

    @classmethod
    def full(cls, per_minute: int, now_s: float) -> Bucket:
        return cls(per_minute, per_minute, now_s)

    def at(self, now_s: float) -> Bucket:
        """The same bucket at a later time."""
        gained = max(0.0, now_s - self.at_s) * self.per_minute / 60
        return Bucket(self.per_minute, min(self.per_minute, self.level + gained), max(self.at_s, now_s))

    def wait_s(self, amount: int) -> float:
        """Seconds from `at_s` until it holds `amount`: 0 when it does, infinity when it never will."""
        if amount > self.per_minute:
            return math.inf
        return max(0.0, amount - self.level) * 60 / self.per_minute

    def less(self, amount: int) -> Bucket:
        """After a use, covered or not; a negative amount is given back."""
        return replace(self, level=min(self.per_minute, self.level - amount))

    def resized(self, per_minute: int) -> Bucket:
        """Under another limit; what was used stays used."""
        return Bucket(per_minute, min(per_minute, self.level + per_minute - self.per_minute), self.at_s)


class Budget:
    """What one key has left on this API replica. Owns its buckets; what has no limit is not counted."""

    def __init__(self, limits: Amounts, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.limits = limits
        self._buckets = {what: Bucket.full(limit, clock()) for what, limit in limits.items()}

    def resize(self, limits: Amounts) -> None:
        """Go on under these limits."""
        old = self._now()
        self.limits = limits
        self._buckets = {
            what: old[what].resized(limit) if what in old else Bucket.full(limit, self._clock())
            for what, limit in limits.items()
        }

    def take(self, use: Amounts, need: Amounts | None = None) -> None:
        """Use all of `use`, or nothing of it where it is not covered. `need` must be there, too, but stays.

        Raises:
            RateLimited: not covered now.
            InvalidRequest: more than a full bucket; no waiting helps.
        """
        buckets = self._now()
        for what, amount in {**(need or {}), **use}.items():
            if what in buckets:
                _check(what, amount, buckets[what])
        self._less(use)

    def charge(self, use: Amounts) -> None:
        """Use it, covered or not: it has happened."""
        self._less(use)

    def refund(self, used: Amounts) -> None:
        """Give back what was taken for nothing."""
        self._less({what: -amount for what, amount in used.items()})

    def headers(self) -> list[tuple[bytes, bytes]]:
        """OpenAI's `x-ratelimit-limit-*`, `-remaining-*` and `-reset-*` (until the bucket is full) of each limit."""
        out: list[tuple[bytes, bytes]] = []
        for what, bucket in self._now().items():
            values = {
                "limit": str(bucket.per_minute),
                "remaining": str(max(0, math.floor(bucket.level))),
                "reset": duration(bucket.wait_s(bucket.per_minute)),
            }
            out += [(f"x-ratelimit-{name}-{what}".encode(), value.encode()) for name, value in values.items()]
        return out

    def _now(self) -> dict[Limited, Bucket]:
        now_s = self._clock()
        return {what: bucket.at(now_s) for what, bucket in self._buckets.items()}

    def _less(self, amounts: Mapping[Limited, int]) -> None:
        buckets = self._now()
        self._buckets = {what: bucket.less(amounts.get(what, 0)) for what, bucket in buckets.items()}


def duration(seconds: float) -> str:
    """As OpenAI writes it: 0.25 -> "250ms", 59.5 -> "59.5s", 360 -> "6m0s"."""
    millis = math.ceil(seconds * 1000)
    if millis < 1000:
        return f"{millis}ms"
    minutes, rest = divmod(millis, 60_000)
    return f"{minutes}m{rest / 1000:g}s" if minutes else f"{rest / 1000:g}s"


def _check(what: Limited, amount: int, bucket: Bucket) -> None:
    wait_s = bucket.wait_s(amount)
    if math.isinf(wait_s):
        raise InvalidRequest(
            f"the request takes {amount} {what}, and this key may use {bucket.per_minute} a minute; send less at once",
            code="request_too_large",
        )
    if wait_s > 0:
        raise RateLimited(
            f"this key may use {bucket.per_minute} {what} a minute, and has {max(0, math.floor(bucket.level))} left "
            f"of the {amount} that the request takes; retry in {math.ceil(wait_s)} s",
            wait_s,
        )
