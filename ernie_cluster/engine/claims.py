"""Senders that wait until their place here is reserved: they begin to send when they are answered.

A claim names its request and attempt, and perhaps the pictures that it is about: several vision replicas may share those
of one request, and two may be asked for the same. Knows no engine; whoever uses it holds a lock.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ernie_cluster.transport.base import Message, Reply


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """One sender that waits."""

    request_id: str
    epoch: int
    message: Message
    """As it was sent; its type says what will come."""
    reply: Reply
    deadline_s: float

    @property
    def media(self) -> tuple[int, ...] | None:
        """The pictures that would come from it; None = all of the request."""
        named = self.message.get("media")
        return tuple(int(i) for i in named) if isinstance(named, list) else None  # type: ignore[arg-type]

    def refuse(self, reason: str) -> None:
        """There will be no place."""
        self.reply({"error": reason})


class Claims:
    """Owns those that wait."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[Claim]] = {}

    def newest(self, request_id: str) -> int | None:
        """The newest attempt of a request of which somebody waits; None = nobody does."""
        return max((claim.epoch for claim in self._waiting.get(request_id, ())), default=None)

    def add(self, claim: Claim) -> None:
        """Let it wait; older attempts, and whoever wanted to send the same unless that is pictures, are refused."""
        others = self._waiting.pop(claim.request_id, [])
        kind = claim.message["type"]
        is_only = claim.media is None
        rivals = [
            c for c in others if c.epoch != claim.epoch or (is_only and c.media is None and c.message["type"] == kind)
        ]
        self._waiting[claim.request_id] = [*(c for c in others if c not in rivals), claim]
        for rival in rivals:
            rival.refuse(f"request {claim.request_id}: attempt {claim.epoch} claims this place")

    def take(self, request_id: str, epoch: int | None, kind: str | None = None) -> list[Claim]:
        """Those of an attempt and of a type of message, None = of any; they wait no longer, and are the caller's to answer."""
        waiting = self._waiting.pop(request_id, [])
        taken = [c for c in waiting if epoch in (None, c.epoch) and kind in (None, c.message["type"])]
        left = [c for c in waiting if c not in taken]
        if left:
            self._waiting[request_id] = left
        return taken

    def overdue(self, now_s: float) -> Iterator[Claim]:
        """Take out those that have waited in vain."""
        for claim in [c for waiting in self._waiting.values() for c in waiting if c.deadline_s <= now_s]:
            left = [c for c in self._waiting[claim.request_id] if c is not claim]
            self._waiting[claim.request_id] = left
            if not left:
                del self._waiting[claim.request_id]
            yield claim
