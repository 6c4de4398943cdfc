"""What an engine has done since it started; two looks at it differ by what it did in between."""

from __future__ import annotations

from dataclasses import dataclass

from ernie_cluster.engine.scheduler import Schedule
from ernie_cluster.sums import Sums


@dataclass(slots=True)
class Counters:
    """Only ever grows, and only with work. A preempted sequence is read again, so its tokens count again."""

    steps: int = 0
    prompt_tokens: int = 0
    """Computed, those of caches not counted."""
    generated_tokens: int = 0
    preemptions: int = 0
    run_s: float = 0.0
    reading: Sums = Sums()
    """(tokens, seconds) of each prompt that was computed to its end: its share, by tokens, of the steps that it was in."""
    writing: Sums = Sums()
    """(KV tokens of the batch, seconds) of each step that held no prompt."""
    written: int = 0
    """Sequences in those steps, counted in each."""

    def note_step(self, schedule: Schedule, context_tokens: int, num_generated: int, run_s: float) -> None:
        """A step was run, and is not applied yet.

        Args:
            context_tokens: K and V that its decoding sequences read, their newest tokens' included.
            num_generated: tokens that came out of it.
        """
        self.steps += 1
        self.run_s += run_s
        self.prompt_tokens += schedule.num_tokens - len(schedule.decodes)
        self.generated_tokens += num_generated
        if not schedule.chunks:
            self.writing += Sums.of((context_tokens, run_s))
            self.written += len(schedule.decodes)
            return
        token_s = run_s / schedule.num_tokens
        for sequence, count in schedule.chunks:
            sequence.read_tokens += count
            sequence.read_s += count * token_s
            if count == sequence.num_uncomputed:
                self.reading += Sums.of((sequence.read_tokens, sequence.read_s))
                sequence.read_tokens, sequence.read_s = 0, 0.0
