"""What the scaling decision wants to know, gathered between two looks. Reads no clock: `now_s` comes in.

Demand is counted where requests arrive, speed where they are worked on, and what clients saw where their answers end.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ernie_cluster.config.pool import Role
from ernie_cluster.policy.scaling.snapshot import ModelState, ReplicaState, ScalingSnapshot, StageStats
from ernie_cluster.policy.snapshot import Demand, Promise
from ernie_cluster.policy.waiting import Held
from ernie_cluster.sums import Sums

_MEMORY = 0.95
"""What each prompt leaves of the weight of those before it, in the part of prompts that no cache holds."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a rank has done since it started; two of them differ by what it did in between."""

    num_prompts: int = 0
    """Prompts computed to their end; on a vision rank pictures."""
    prompt_tokens: int = 0
    """Computed, those of caches not counted; on a vision rank tokens of pictures."""
    output_tokens: int = 0
    """Generated, the first of each answer included."""
    reading: Sums = Sums()
    """(tokens, seconds) of each prompt's computing, its share of the steps that it was in; of each picture's encoding."""
    writing: Sums = Sums()
    """(KV tokens of the batch, seconds) of each step that held no prompt."""
    written: int = 0
    """Sequences in those steps, counted in each."""

    def since(self, before: Work) -> Work:
        """What was done after `before`, of the same life of the same rank."""
        return Work(
            self.num_prompts - before.num_prompts,
            self.prompt_tokens - before.prompt_tokens,
            self.output_tokens - before.output_tokens,
            self.reading + before.reading.faded(-1.0),
            self.writing + before.writing.faded(-1.0),
            self.written - before.written,
        )


@dataclass(frozen=True, slots=True)
class Lane:
    """A replica, or one of the groups of its ranks that take requests of their own, as it last told of itself."""

    lane_id: str
    gang: str
    """The replica that it belongs to."""
    model: str
    role: Role
    """At present."""
    incarnation: str
    work: Work = Work()
    backlog_tokens: int = 0
    """Prompt tokens, or tokens of pictures, that wait."""
    kv_tokens: int = 0
    """That it can hold."""
    is_idle: bool = True


@dataclass(slots=True)
class Tally:
    """What came of one model since the last look."""

    requests: int = 0
    prompt_tokens: float = 0.0
    pictures: int = 0
    media_tokens: float = 0.0
    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)


class Observer:
    """Counts between two looks; begins to at `now_s`."""

    def __init__(self, now_s: float) -> None:
        self._at_s = now_s
        self._tallies: defaultdict[str, Tally] = defaultdict(Tally)
        self._fresh: defaultdict[str, float] = defaultdict(float)
        """Prompt tokens that no cache held, weighted, by model."""
        self._total: defaultdict[str, float] = defaultdict(float)
        self._works: dict[tuple[str, str], Work] = {}
        """By lane and incarnation, at the last look. What a lane did before it was first seen took nobody knows how long, so it
        counts nowhere."""
        self._busy_s: dict[str, float] = {}
        """When each model was last seen busy."""

    def offered(self, demand: Demand, promises: Sequence[Promise] | None) -> None:
        """A request came. Of one that was refused (None) the caches are taken to hold as much as usual."""
        model, tally = demand.model, self._tallies[demand.model]
        tally.requests += 1
        tally.pictures += bool(demand.num_media)
        if promises is None:
            usual = self._fresh[model] / self._total[model] if self._total[model] else 1.0
            tally.prompt_tokens += demand.num_prompt_tokens * usual
            tally.media_tokens += demand.media_tokens
            return
        fresh = sum(p.tokens for p in promises)
        tally.prompt_tokens += fresh
        tally.media_tokens += sum(p.media_tokens for p in promises)
        self._fresh[model] = _MEMORY * self._fresh[model] + fresh
        self._total[model] = _MEMORY * self._total[model] + demand.num_prompt_tokens

    def ended(self, model: str, ttft_s: float | None, tpot_s: float | None) -> None:
        """An answer ended or broke off; None is what it did not come to."""
        tally = self._tallies[model]
        if ttft_s is not None:
            tally.ttft_s.append(ttft_s)
        if tpot_s is not None:
            tally.tpot_s.append(tpot_s)

    def look(
        self,
        replicas: Mapping[str, Sequence[ReplicaState]],
        lanes: Sequence[Lane],
        held: Mapping[str, Held],
        now_s: float,
    ) -> ScalingSnapshot:
        """What there is to see of each model now; begins to count anew.

        Args:
            replicas: by model, every model of the configuration.
            held: requests that wait for a place, by model.
        """
        seconds, self._at_s = max(now_s - self._at_s, 1e-9), now_s
        works = {(lane.lane_id, lane.incarnation): lane.work for lane in lanes}
        done = {key: work.since(self._works.get(key, work)) for key, work in works.items()}
        self._works = works
        states = []
        for model, those in replicas.items():
            own = [(lane, done[lane.lane_id, lane.incarnation]) for lane in lanes if lane.model == model]
            states.append(self._model(model, tuple(those), own, held.get(model, Held()), seconds, now_s))
        self._tallies.clear()
        return ScalingSnapshot(tuple(states))

    def _model(
        self,
        name: str,
        replicas: tuple[ReplicaState, ...],
        lanes: list[tuple[Lane, Work]],
        held: Held,
        seconds: float,
        now_s: float,
    ) -> ModelState:
        tally = self._tallies[name]
        is_coming = any(
            r.phase in ("starting", "planned", "silent") for r in replicas
        )  # for somebody, who is not here yet
        if is_coming or held.num_requests or tally.requests or not all(lane.is_idle for lane, _ in lanes):
            self._busy_s[name] = now_s
        engines = [(lane, work) for lane, work in lanes if lane.role != "vision"]
        eyes = [(lane, work) for lane, work in lanes if lane.role == "vision"]
        steps = sum((work.writing for _, work in engines), Sums())
        written = sum(work.written for _, work in engines)
        capacity = sum(lane.kv_tokens for lane, _ in engines)
        return ModelState(
            name=name,
            replicas=replicas,
            prefill=StageStats(
                tally.requests / seconds,
                tally.prompt_tokens / seconds,
                sum(lane.backlog_tokens for lane, _ in engines),
                p90(tally.ttft_s),
                sum((work.reading for _, work in engines), Sums()),
            ),
            decode=StageStats(
                tally.requests / seconds,
                sum(work.output_tokens for _, work in engines) / seconds,
                0.0,
                p90(tally.tpot_s),
                steps,
            ),
            vision=StageStats(
                tally.pictures / seconds,
                tally.media_tokens / seconds,
                sum(lane.backlog_tokens for lane, _ in eyes) if eyes else held.media_tokens,
                None,
                sum((work.reading for _, work in eyes), Sums()),
            ),
            kv_tokens=capacity / len({lane.gang for lane, _ in engines}) if engines else 0.0,
            context_tokens=steps.x / written if written else 0.0,
            num_held=held.num_requests,
            idle_s=now_s - self._busy_s.setdefault(name, now_s),
        )


def p90(values: list[float]) -> float | None:
    """The ninth decile, None of nothing."""
    return sorted(values)[math.ceil(0.9 * len(values)) - 1] if values else None
