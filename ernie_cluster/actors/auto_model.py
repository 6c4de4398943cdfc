"""The alias that chooses between two models, by `policy.choice` and by how long first tokens took lately on this replica."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ernie_cluster.config.auto_model import AutoModelConfig
from ernie_cluster.policy.choice import Errand, choose_model

_KEEP = 0.7
"""Of the average of the times seen, when another one comes."""


@dataclass(slots=True)
class AutoModel:
    """See `api.alias.Alias`. What was seen long ago is forgotten, so that a model that was late is tried again."""

    config: AutoModelConfig
    clock: Callable[[], float]
    _seen: dict[str, tuple[float, float]] = field(default_factory=dict)
    """By served name: (average, when it was last seen)."""

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def models(self) -> tuple[str, ...]:
        return self.config.large, self.config.small

    def choose(
        self, *, prompt_tokens: int, media_bytes: int, wants_thinking: bool, may_overflow: bool
    ) -> tuple[str, str]:
        errand = Errand(prompt_tokens, media_bytes, wants_thinking, may_overflow)
        choice = choose_model(errand, {model: self._ttft_s(model) for model in self.models}, self.config)
        return choice.model, choice.reason

    def saw(self, model: str, ttft_s: float) -> None:
        known = self._ttft_s(model)
        average = ttft_s if known is None else _KEEP * known + (1 - _KEEP) * ttft_s
        self._seen[model] = average, self.clock()

    def _ttft_s(self, model: str) -> float | None:
        average, at_s = self._seen.get(model, (0.0, None))
        return None if at_s is None or self.clock() - at_s > self.config.memory_s else average
