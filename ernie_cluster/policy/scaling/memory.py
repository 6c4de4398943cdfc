"""What the scaling decision remembers from one look to the next: averages, and when it last did what."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ernie_cluster.config.scaling import ScalingConfig
from ernie_cluster.policy.scaling.snapshot import ModelState, StageStats, Sums

_MAX_CORRECTION = 1.5
_CORRECTION_S = 60.0
"""In which a stage that misses its target is taken to need about e times as much; up to `_MAX_CORRECTION`."""
_FORGIVE_S = 1800.0
_DECODE_SMOOTHING = 0.3
"""Of the time constant: what decode emits is an average over the answers in progress already."""
_EASY = 0.6
"""Of its target: below, a stage's correction fades."""


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Averages of one stage."""

    requests_per_s: float = 0.0
    tokens_per_s: float = 0.0
    peak_tokens_per_s: float = 0.0
    """At least `tokens_per_s`; falls slowly."""
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


def remembered(memory: ModelMemory, state: ModelState, config: ScalingConfig, dt_s: float | None) -> ModelMemory:
    """Memory with one more look taken in; what it corrects, `corrected` says.

    Args:
        dt_s: since the look before; None at the first.
    """
    keep = 0.0 if dt_s is None else math.exp(-dt_s / config.smoothing_s)
    context = memory.context_tokens
    if state.context_tokens:
        context = state.context_tokens if not context else keep * context + (1 - keep) * state.context_tokens

    return replace(
        memory,
        prefill=_stage(memory.prefill, state.prefill, config, config.smoothing_s, dt_s),
        decode=_stage(memory.decode, state.decode, config, config.smoothing_s * _DECODE_SMOOTHING, dt_s),
        vision=_stage(memory.vision, state.vision, config, config.smoothing_s, dt_s),
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


def _stage(
    old: StageMemory, stats: StageStats, config: ScalingConfig, smoothing_s: float, dt_s: float | None
) -> StageMemory:
    if dt_s is None:
        tokens = stats.tokens_per_s
        return StageMemory(stats.requests_per_s, tokens, tokens, stats.samples)
    keep, keep_peak = math.exp(-dt_s / smoothing_s), math.exp(-dt_s / config.memory_s)
    tokens = keep * old.tokens_per_s + (1 - keep) * stats.tokens_per_s
    peak = max(tokens, keep_peak * old.peak_tokens_per_s + (1 - keep_peak) * tokens)
    samples = old.samples.faded(math.exp(-dt_s / (2 * config.smoothing_s))) if stats.samples.n else old.samples
    keep_requests = math.exp(-dt_s / config.smoothing_s)
    requests = keep_requests * old.requests_per_s + (1 - keep_requests) * stats.requests_per_s
    return StageMemory(requests, tokens, peak, samples + stats.samples, old.correction)
