"""How many replicas a stage needs for its targets: queueing theory with measured rates. Real numbers, rounded by others.

Prefill and vision replicas queue. With c of them, utilisation rho = load / c, mean service time S with squared variation v,
the chance to wait is about rho ** (sqrt(2 (c + 1)) - 1), and who waits does so for S (1 + v) / (2 c (1 - rho)) on average
(Sakasegawa's and Allen and Cunneen's approximations of M/G/c), exponentially distributed.

Decode replicas share: a step takes a + b * (KV tokens of its batch), measured. TPOT bounds the KV tokens of a batch, as
does memory; by Little's law the answers in progress are tokens per second * TPOT, and scatter as a Poisson number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ernie_cluster.config.scaling import Targets
from ernie_cluster.policy.scaling.memory import ModelMemory, StageMemory
from ernie_cluster.policy.scaling.snapshot import ModelState, StageStats

MAX_UTILISATION = 0.92
"""Of a replica that queues, however lax the target: measured rates wander."""
_MAX_KV = 0.9
"""Of the KV tokens that a replica can hold: prompts come in pieces of their own size."""
_TPOT_ROOM = 0.95
"""Of the target: load does not spread evenly."""
_P90 = 1.2816
"""Standard deviations from a normal mean to its ninth decile."""
NOISE = 1.5
"""Standard deviations of the measured demand that may be noise."""
_LEAST_WAIT = 0.05
"""Of the target, where computing alone takes all of it: no number of replicas helps, but queues still hurt."""


@dataclass(frozen=True, slots=True)
class Needs:
    """Replicas of one model, as real numbers; None where nothing was measured yet."""

    prefill: float | None
    decode: float | None
    vision: float | None


def needs_of(
    state: ModelState, memory: ModelMemory, targets: Targets, *, at_peak: bool = False, has_backlog: bool = True
) -> Needs:
    """What a model needs now.

    Args:
        at_peak: what it needed lately, instead.
        has_backlog: also to catch up with what waits.
    """
    encode_s = _usual_s(memory.vision)
    spent_s = encode_s if memory.vision.tokens_per_s else 0.0
    return Needs(
        prefill=_queue_need(memory.prefill, state.prefill, targets, spent_s, at_peak, has_backlog),
        decode=_decode_need(memory, state, targets, at_peak),
        vision=_queue_need(memory.vision, state.vision, targets, _usual_s(memory.prefill), at_peak, has_backlog),
    )


def role_needs(state: ModelState, memory: ModelMemory, targets: Targets) -> Needs:
    """What the stages need that share the same replicas.

    What waits counts as far as it shows that the average of the demand is too low, within its error, and no further: what
    a stage has lost is lost, and lending it what the other needs makes both late.
    """
    steady = needs_of(state, memory, targets, has_backlog=False)
    full = needs_of(state, memory, targets)
    if steady.prefill is None or full.prefill is None:
        return steady
    most = steady.prefill * (1 + NOISE * noise_of(memory.prefill))
    return replace(steady, prefill=min(full.prefill, most))


def wait_p90_s(replicas: float, load: float, service_s: float, variation: float) -> float:
    """Ninth decile of the wait before `replicas`, infinite when they cannot keep up.

    Args:
        load: requests per second * `service_s`, more than 0.
        service_s: mean of one request.
        variation: squared coefficient of variation of it.
    """
    if replicas <= load:
        return math.inf
    chance = (load / replicas) ** (math.sqrt(2 * (replicas + 1)) - 1)
    if chance <= 0.1:
        return 0.0
    return service_s * (1 + variation) / (2 * (replicas - load)) * math.log(10 * chance)


def replicas_for_wait(load: float, service_s: float, variation: float, wait_s: float) -> float:
    """Fewest replicas with `wait_p90_s` at most `wait_s` (more than 0) and utilisation at most `MAX_UTILISATION`."""
    low = load / MAX_UTILISATION
    if load <= 0 or wait_p90_s(low, load, service_s, variation) <= wait_s:
        return max(low, 0.0)
    high = 2 * low
    while wait_p90_s(high, load, service_s, variation) > wait_s:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        if wait_p90_s(middle, load, service_s, variation) > wait_s:
            low = middle
        else:
            high = middle
    return high


def noise_of(memory: StageMemory) -> float:
    """Relative error of a stage's averaged demand: about one over the root of the requests in it."""
    count = 2 * memory.smoothing_s * memory.requests_per_s
    return math.sqrt((1 + memory.samples.variation) / count) if count > 1 else 1.0


def _usual_s(stage: StageMemory) -> float:
    return stage.samples.t / stage.samples.n if stage.samples.n else 0.0


def _queue_need(
    stage: StageMemory, stats: StageStats, targets: Targets, elsewhere_s: float, at_peak: bool, has_backlog: bool
) -> float | None:
    """None where no service was measured.

    Args:
        elsewhere_s: of TTFT, that another stage takes.
    """
    sums = stage.samples
    if not sums.n or not sums.x:
        return None
    base_s, per_token_s = sums.line
    mean_tokens = sums.x / sums.n
    service_s = sums.t / sums.n
    large_s = base_s + per_token_s * mean_tokens * (1 + _P90 * math.sqrt(sums.variation))
    room_s = targets.ttft_s - elsewhere_s - large_s
    wait_s = min(targets.queue_s, max(room_s, _LEAST_WAIT * targets.ttft_s))
    tokens_per_s = stage.peak_tokens_per_s if at_peak else stage.tokens_per_s
    seconds_per_token = service_s / mean_tokens
    load = tokens_per_s * seconds_per_token * stage.correction
    late_s = stats.backlog_tokens * seconds_per_token if has_backlog else 0.0
    steady = replicas_for_wait(load, service_s, sums.variation, wait_s)
    # What waits beyond that many replicas' fair queue is to be gone within a few targets' time.
    return steady + max(0.0, late_s - steady * targets.queue_s) / (4 * targets.queue_s)


def _decode_need(memory: ModelMemory, state: ModelState, targets: Targets, at_peak: bool) -> float | None:
    stage = memory.decode
    if not stage.samples.n or not memory.context_tokens or not state.kv_tokens:
        return None
    base_s, per_kv_s = stage.samples.line
    tpot_s = _TPOT_ROOM * targets.tpot_s
    room = _MAX_KV * state.kv_tokens
    if per_kv_s > 0:
        room = min(room, (tpot_s - base_s) / per_kv_s)
    room = max(
        room, memory.context_tokens
    )  # even one sequence may be too slow: more replicas then give it one of its own
    tokens_per_s = (stage.peak_tokens_per_s if at_peak else stage.tokens_per_s) * stage.correction
    running = tokens_per_s * (base_s + per_kv_s * room)
    return (running + math.sqrt(running)) * memory.context_tokens / room
