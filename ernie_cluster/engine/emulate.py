"""Steps that last as long as on imagined hardware: computed with the real model, then waited out. See `config.emulate`.

Nothing else knows: whoever measures a step, measures the imagined one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields

from ernie_cluster.config.emulate import EmulateConfig
from ernie_cluster.engine.runner import Runner
from ernie_cluster.engine.sampler import Sampled, SamplerRow
from ernie_cluster.model.decoder import no_hook
from ernie_cluster.model.step import StepInput

log = logging.getLogger(__name__)

_SAY_AGAIN_S = 60.0
_AT_ONCE_S = 0.02
"""Between two steps of a busy engine passes less; after more it had nothing to do."""


class Patience:
    """Makes work last as long as imagined: waits for the rest of it, and catches up where it woke too late.

    Args:
        clock: seconds.
        sleep: lets seconds pass, without holding the interpreter.
    """

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.clock, self._sleep = clock, sleep
        self.num_late = 0
        """Pieces of work that took longer than imagined by themselves."""
        self._ended_s = self._debt_s = 0.0
        self._quiet_until_s = 0.0

    def until(self, start_s: float, lasts_s: float) -> None:
        """Work that began at `start_s` is done, and is to have lasted `lasts_s`.

        A machine with few cores wakes us late. Work that follows at once is shorter by that, at most to nothing but its own
        time, so that many pieces together last as long as imagined.
        """
        now_s = self.clock()
        if now_s > start_s + lasts_s:
            self._tell(now_s - start_s, lasts_s)
        if start_s - self._ended_s < _AT_ONCE_S:
            start_s -= self._debt_s
        due_s = start_s + lasts_s
        if due_s > now_s:
            self._sleep(due_s - now_s)
        self._ended_s = self.clock()
        self._debt_s = min(self._ended_s - due_s, lasts_s)

    def _tell(self, took_s: float, lasts_s: float) -> None:
        """Figures mean less where this happens; one line a minute says so."""
        self.num_late += 1
        if self.clock() < self._quiet_until_s:
            return
        self._quiet_until_s = self.clock() + _SAY_AGAIN_S
        log.warning(
            "engine.emulate imagines %.1f ms for what took %.1f ms (%d times so far): imagine slower hardware, or fewer "
            "replicas on this machine",
            1e3 * lasts_s,
            1e3 * took_s,
            self.num_late,
        )


@dataclass(frozen=True, slots=True, eq=False)
class EmulatedRunner(Runner):
    """A `Runner` that takes its time."""

    emulate: EmulateConfig = EmulateConfig()
    patience: Patience = field(default_factory=Patience)

    @classmethod
    def of(cls, runner: Runner, emulate: EmulateConfig | None, patience: Patience | None = None) -> Runner:
        """The same rank at the imagined speed; `runner` itself where nothing is imagined."""
        if emulate is None:
            return runner
        own = {f.name: getattr(runner, f.name) for f in fields(runner)}
        return cls(**own, emulate=emulate, patience=patience or Patience())

    def run(self, step: StepInput, rows: Sequence[SamplerRow], layer_done: Callable[[int], None] = no_hook) -> Sampled:
        """As of `Runner`. KV leaves as soon as it is computed, so hand-overs hide behind the wait as behind layers."""
        start_s = self.patience.clock()
        sampled = Runner.run(self, step, rows, layer_done)
        answers = step.num_decode
        kv_tokens = sum(step.context_lens[:answers])
        self.patience.until(start_s, self.emulate.of_step(step.num_tokens - answers, answers, kv_tokens))
        return sampled
