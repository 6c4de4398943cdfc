"""What the scaling decision remembers from one look to the next: averages, and when it last did what."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ernie_cluster.config.scaling import ScalingPace
from ernie_cluster.policy.scaling.snapshot import ModelState, StageStats
from ernie_cluster.sums import Sums

_MAX_CORRECTION = 1.5
_CORRECTION_S = 120.0
"""In which a stage that misses its target is taken to need about e times as much; up to `_MAX_CORRECTION`."""
_FORGIVE_S = 1800.0
_DECODE_SMOOTHING = 0.3
"""Of the time constant: what decode emits is an average over the answers in progress already."""
_NOISE = 0.05
"""Relative error of the averaged demand that is good enough: with many requests a short time gives it."""
_LEAST_SMOOTHING = 0.2
"""Of the time constant, however many requests there are."""
_EASY = 0.6
"""Of its target: below, a stage's correction fades."""


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Averages of one stage."""

    requests_per_s: float = 0.0
    tokens_per_s: float = 0.0
    peak_tokens_per_s: float = 0.0
    """At least `tokens_per_s`; falls slowly."""
    smoothing_s: float = 1.0
    """Over which the last average was taken."""
    samples: Sums = Sums()
    correction: float = 1.0
    """Learned: how much more this stage needs than the formula says, 1 to 1.5."""


@dataclass(frozen=True, slots=True)
class ModelMemory:
    """Of one model."""

    prefill: StageMemory = StageMemory()
    decode: StageMemory = StageMemory()
    vision: StageMemory = StageMemory()
    context_tokens: float = 0.0
    switched_s: float = -math.inf
    """When replicas last switched, and from which role."""
    switched_from: str = ""
    taken_s: float = -math.inf
    """When a GPU was last moved away from it or to it."""
    low_since_s: float | None = None
    """Since when fewer engine replicas were enough; None while they are not."""
    vision_low_since_s: float | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """Immutable; each decision returns the next."""

    at_s: float | None = None
    """Of the last look; None before the first."""
    models: tuple[tuple[str, ModelMemory], ...] = ()

    def of(self, name: str) -> ModelMemory:
        return next((m for n, m in self.models if n == name), ModelMemory())

    def switched(self, name: str, source: str, now_s: float) -> Memory:
        """The memory after somebody else has switched replicas of a model."""
        there = dict(self.models) | {name: replace(self.of(name), switched_s=now_s, switched_from=source)}
        return replace(self, models=tuple(there.items()))


def remembered(memory: ModelMemory, state: ModelState, pace: ScalingPace, dt_s: float | None) -> ModelMemory:
    """Memory with one more look taken in; what it corrects, `corrected` says.

    Args:
        dt_s: since the look before; None at the first.
    """
    context = memory.context_tokens
    if state.context_tokens:
        periods = math.inf if not context or dt_s is None else dt_s / pace.smoothing_s
        context = _mean(context, state.context_tokens, periods)
    return replace(
        memory,
        prefill=_stage(memory.prefill, state.prefill, pace, pace.smoothing_s, dt_s),
        decode=_stage(memory.decode, state.decode, pace, pace.smoothing_s * _DECODE_SMOOTHING, dt_s),
        vision=_stage(memory.vision, state.vision, pace, pace.smoothing_s, dt_s),
        context_tokens=context,
    )


def corrected(stage: StageMemory, latency_s: float | None, target_s: float, dt_s: float) -> StageMemory:
    """Memory of a stage that should do well, after what was measured: too slow, and it is taken to need more."""
    factor = stage.correction
    if latency_s is not None and latency_s > target_s:
        factor = min(_MAX_CORRECTION, factor * math.exp(dt_s / _CORRECTION_S))
    elif latency_s is not None and latency_s < _EASY * target_s:
        factor = 1 + (factor - 1) * math.exp(-dt_s / _FORGIVE_S)
    return replace(stage, correction=factor)


def _stage(old: StageMemory, stats: StageStats, pace: ScalingPace, most_s: float, dt_s: float | None) -> StageMemory:
    """One more look at a stage, averaged over at most `most_s`."""
    if dt_s is None:
        tokens = stats.tokens_per_s
        return StageMemory(stats.requests_per_s, tokens, tokens, most_s, stats.samples)
    enough = (1 + old.samples.variation) / (2 * _NOISE**2)
    enough_s = enough / old.requests_per_s if old.requests_per_s * most_s > enough else most_s
    smoothing_s = min(most_s, max(enough_s, _LEAST_SMOOTHING * pace.smoothing_s))
    tokens = _mean(old.tokens_per_s, stats.tokens_per_s, dt_s / smoothing_s)
    return StageMemory(
        requests_per_s=_mean(old.requests_per_s, stats.requests_per_s, dt_s / pace.smoothing_s),
        tokens_per_s=tokens,
        peak_tokens_per_s=max(tokens, _mean(old.peak_tokens_per_s, tokens, dt_s / pace.memory_s)),
        smoothing_s=smoothing_s,
        samples=old.samples.faded(math.exp(-dt_s / (2 * pace.smoothing_s)) if stats.samples.n else 1) + stats.samples,
        correction=old.correction,
    )


def _mean(old: float, new: float, periods: float) -> float:
    """Average that forgets a fraction of 1 - 1/e per period."""
    keep = math.exp(-periods)
    return keep * old + (1 - keep) * new
