"""Hardware that is only imagined: how long it would take, so that scaling and routing can be tried without it."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ernie_cluster.config.checks import check_range


@dataclass(frozen=True, slots=True)
class EmulateConfig:
    """What work lasts on it, in seconds, each at least 0. A replica computes as ever, and then waits for the rest.

    A step is a prompt's or a decode step by what is in it, and its parts add up; what takes longer in truth, does.
    """

    chunk_s: float = 0.0
    """A step with tokens of prompts, whatever it holds."""
    token_s: float = 0.0
    """Each prompt token in it."""
    step_s: float = 0.0
    """A step without tokens of prompts."""
    sequence_s: float = 0.0
    """Each sequence that gets its next token in a step of either kind."""
    kv_token_s: float = 0.0
    """Each token of KV that those sequences read."""
    picture_s: float = 0.0
    """A picture or video, on a vision replica."""
    media_token_s: float = 0.0
    """Each of its tokens."""

    def __post_init__(self) -> None:
        check_range(self, 0, *(f.name for f in fields(self)))

    def of_step(self, prompt_tokens: int, sequences: int, kv_tokens: int) -> float:
        """Seconds of a step.

        Args:
            prompt_tokens: tokens of prompts in it.
            sequences: that get their next token in it.
            kv_tokens: that those read.
        """
        begun_s = self.chunk_s + prompt_tokens * self.token_s if prompt_tokens else self.step_s
        return begun_s + sequences * self.sequence_s + kv_tokens * self.kv_token_s

    def of_picture(self, tokens: int) -> float:
        """Seconds of a picture or video of so many tokens."""
        return self.picture_s + tokens * self.media_token_s
