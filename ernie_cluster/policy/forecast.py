"""When an answer will begin and end: what the books say, corrected by how earlier answers went. Reads no clock.

Replicas know how long they compute. What lies between them (calls, hand-overs, the way of the first token, other work on
the same machine) nobody foresees, so it is learned: for each model, kind of path and class of work a line from what was
foretold to what came. Batch work is a class of its own: on its replica all that is more urgent goes before it, whenever that
comes, so how long it takes depends on what others will ask.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from ernie_cluster.config.router import RouterConfig
from ernie_cluster.policy.admission import Refusal
from ernie_cluster.policy.fleet import Fleet
from ernie_cluster.policy.routing import Path
from ernie_cluster.policy.snapshot import Demand, ReplicaSnapshot
from ernie_cluster.sums import Sums

_MEMORY = 0.95
"""What each answer leaves of the weight of those before it: about twenty count."""
_MAX_SURPRISE = 3.0
"""An answer that took more than this many times as long as was expected, or less than one part in so many, counts as if it
had taken just that: one that was disturbed shall not spoil the next twenty, a change is followed in a few steps."""
_SLACK_S = 0.05
"""On top of that: of two milliseconds nobody knows how many times as long they may take."""
_PACE, _MAX_MISSING = 0.25, 0.4
"""Part of what a size's share misses that each answer makes good, and the most that counts as missing."""
_LEAST_S = 0.001
"""What is foretold counts as at least this long where shares of it are looked at."""
_TRUST = Sums.of((1.0, 1.0)).faded(0.5) + Sums.of((10.0, 10.0)).faded(0.005)
"""Long times are taken for what was foretold until there are some: as if half an answer of 1 s and one of 10 s had been so."""
_CARE = 1.5
"""Nobody is let in for whose answer there is less time than this many times what is foretold: others come after him."""
_BATCH_CARE = 3.0
"""The same for batch work, whose time says less of that of the next."""
_ALL_BUT = 0.9
"""Who ends after this part of his time may have ended for want of it."""
_MAX_OPEN = 10_000
"""Answers that may be under way; of more, the oldest are forgotten."""


class Correction:
    """From seconds that were foretold to seconds that are likely: a line through what came, by least squares of the shares
    by which it misses; and for each size (powers of two) the share by which the line still misses, as prompts take more
    than in proportion to their length."""

    def __init__(self) -> None:
        self._seen = Sums()
        self._shares: dict[int, float] = {}
        """By the power of two; between two of them it goes over from one to the other."""

    def of(self, foretold_s: float) -> float:
        """What is likely; at least 0. The same before anything was seen."""
        return self._line_of(foretold_s) * self._share_of(foretold_s) if self._seen.n else foretold_s

    def note(self, foretold_s: float, measured_s: float) -> None:
        """So much came of what was foretold."""
        likely_s = self.of(foretold_s)
        bounded_s = min(max(measured_s, likely_s / _MAX_SURPRISE), likely_s * _MAX_SURPRISE + _SLACK_S)
        size = max(foretold_s, _LEAST_S)
        self._seen = self._seen.faded(_MEMORY) + Sums.of((foretold_s, bounded_s)).faded(size**-2)
        missing = bounded_s / max(self._line_of(foretold_s), _LEAST_S) - self._share_of(foretold_s)
        missing = min(max(missing, -_MAX_MISSING), _MAX_MISSING)
        for power, part in _powers_around(size):
            self._shares[power] = max(0.0, self._shares.get(power, 1.0) + _PACE * part * missing)

    def _line_of(self, foretold_s: float) -> float:
        if not self._seen.n:
            return foretold_s
        fixed_s, slope = (self._seen + _TRUST).line
        return fixed_s + slope * foretold_s

    def _share_of(self, foretold_s: float) -> float:
        return sum(part * self._shares.get(power, 1.0) for power, part in _powers_around(max(foretold_s, _LEAST_S)))


def _powers_around(size: float) -> tuple[tuple[int, float], tuple[int, float]]:
    """The powers of two below and above, and how near each is. 3 lies between the first and the second: 0.415, 0.585."""
    exact = math.log2(size)
    below = math.floor(exact)
    return (below, 1 - exact + below), (below + 1, exact - below)


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is to be expected of one path."""

    model: str
    kind: str
    """Forecasts of one kind err alike."""
    first_s: float
    """To the first token, by the books."""
    turn_s: float
    """From there until the answer's turn comes, by the books."""
    token_s: float
    """Each further token, by the books."""
    ttft_s: float
    """To the first token, corrected."""
    end_s: float
    """To the last token of the first stretch of the answer, corrected."""
    plain_end_s: float
    """The same by the books."""


@dataclass(frozen=True, slots=True)
class _Open:
    """A forecast whose end is not known yet."""

    outlook: Outlook
    since_s: float
    deadline_s: float


class Forecasts:
    """What was foretold of the answers that are under way, and what was learned from those that are over."""

    def __init__(self, limits: RouterConfig) -> None:
        self._stretch = limits.reserve_output_tokens
        self._first: defaultdict[tuple[str, str], Correction] = defaultdict(Correction)
        self._rest: defaultdict[tuple[str, str], Correction] = defaultdict(Correction)
        self._lengths: dict[str, float] = {}
        """Mean output tokens of a model's answers."""
        self._open: dict[str, _Open] = {}
        self._newest: dict[tuple[str, str], str] = {}
        """Of each kind the key that was kept last."""

    def outlook(self, demand: Demand, path: Path, fleet: Fleet, worked_off_s: float = 0.0) -> Outlook:
        """Of a path that is not booked yet.

        Args:
            worked_off_s: of the queue before the prompt, since the path's replica told of it.
        """
        replica = _replica(fleet, path.decode)
        length = self._lengths.get(demand.model, float(min(demand.max_tokens, self._stretch)))
        batch, num_before = batch_of(replica)
        token_s = replica.rates.step_s + replica.rates.sequence_s * batch
        turn_s = num_before / batch * length * token_s
        # who does all by himself begins with a prompt only when there is a place for its answer
        first_s, turn_s = (path.ttft_s + turn_s, 0.0) if replica.role == "mixed" else (path.ttft_s, turn_s)
        if path.encoder is None:  # else the queue of the encoder may be what is waited for
            first_s = max(0.0, first_s - worked_off_s)
        work = ("batch " if demand.priority > 0 else "") + ("pictures" if path.encoder else "text")
        kind = f"{work}, {'one replica' if path.is_mixed else 'hand-over'}"
        ttft_s = self._first[demand.model, kind].of(first_s)
        rest_s = turn_s + (min(demand.max_tokens, self._stretch) - 1) * token_s
        end_s = ttft_s + self._rest[demand.model, kind].of(rest_s)
        return Outlook(demand.model, kind, first_s, turn_s, token_s, ttft_s, end_s, first_s + rest_s)

    def keep(self, key: str, outlook: Outlook, now_s: float, deadline_s: float) -> None:
        """The attempt goes this way, and must be over by its deadline."""
        self._open[key] = _Open(outlook, now_s, deadline_s)
        self._newest[outlook.model, outlook.kind] = key
        if len(self._open) > _MAX_OPEN:
            del self._open[next(iter(self._open))]

    def is_tried(self, outlook: Outlook, now_s: float) -> bool:
        """Whether the last that was let in with a forecast of this kind is still under way, so that it will tell how
        right such forecasts are."""
        newest = self._open.get(self._newest.get((outlook.model, outlook.kind), ""))
        return newest is not None and now_s < newest.deadline_s

    def learn(self, key: str, ttft_s: float | None, tpot_s: float | None, num_tokens: int, now_s: float) -> None:
        """An attempt is over; unknown ones teach nothing. Of one whose time was over before its first token, or
        before its last, it is known that this would have taken longer.

        Args:
            ttft_s: from the decision to its first token; None without one.
            tpot_s: mean time of each token after the first; None of fewer than two.
            num_tokens: that it has brought.
        """
        attempt = self._open.pop(key, None)
        if attempt is None:
            return
        outlook, lasted_s = attempt.outlook, now_s - attempt.since_s
        ran_out = lasted_s >= _ALL_BUT * (attempt.deadline_s - attempt.since_s)
        first, rest = (of[outlook.model, outlook.kind] for of in (self._first, self._rest))
        if ttft_s is None:
            if ran_out and lasted_s > outlook.ttft_s:
                first.note(outlook.first_s, lasted_s)
            return
        first.note(outlook.first_s, ttft_s)
        if ran_out and lasted_s - ttft_s > outlook.end_s - outlook.ttft_s:
            rest.note(outlook.plain_end_s - outlook.first_s, lasted_s - ttft_s)
            return
        mean = self._lengths.get(outlook.model, float(num_tokens))
        self._lengths[outlook.model] = _MEMORY * mean + (1 - _MEMORY) * num_tokens
        if tpot_s is not None:
            more = num_tokens - 1
            rest.note(outlook.turn_s + more * outlook.token_s, more * tpot_s)


def batch_of(replica: ReplicaSnapshot) -> tuple[int, int]:
    """(sequences of a step, those that wait for a place in it) once one more is there."""
    there = replica.num_running + replica.num_waiting + 1
    batch = min(there, replica.max_running or there)
    return batch, there - batch


def too_late(
    demand: Demand,
    path: Path,
    outlook: Outlook,
    fleet: Fleet,
    left_s: float,
    limits: RouterConfig,
    *,
    is_tried: bool = True,
) -> Refusal | None:
    """Refusal of a request whose answer would not be finished in time, else None.

    Replicas at rest take every request, and where nobody is under way who would tell, one is let in for whom the books alone
    say that there is time: forecasts that err would else never be put right.

    Args:
        left_s: what is left of its time.
        is_tried: see `Forecasts.is_tried`.
    """
    care = _CARE if demand.priority <= 0 else _BATCH_CARE
    need_s = outlook.end_s * care
    if need_s <= left_s or all(_is_at_rest(replica) for replica in _replicas(fleet, path)):
        return None
    if not is_tried and outlook.plain_end_s * care <= left_s:
        return None
    reason = (
        f"{demand.model!r}: the answer would take {need_s:.1f} s, and {max(0.0, left_s):.1f} s are left of its time"
    )
    return Refusal(reason, max(limits.retry_after_s, need_s - left_s), is_late=True)


def _is_at_rest(replica: ReplicaSnapshot) -> bool:
    return not (replica.num_running or replica.num_waiting or replica.waiting_tokens)


def _replicas(fleet: Fleet, path: Path) -> Iterator[ReplicaSnapshot]:
    return (_replica(fleet, replica_id) for replica_id in (path.prefill, path.decode))


def _replica(fleet: Fleet, replica_id: str) -> ReplicaSnapshot:
    member = fleet.member(replica_id)
    assert member is not None, f"{replica_id} was chosen and is not there"
    return member.now
