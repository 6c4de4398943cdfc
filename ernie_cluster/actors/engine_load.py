"""From what an engine knows of itself to what its rank tells the router."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ernie_cluster.actors.duty import Duty
from ernie_cluster.actors.messages import Load
from ernie_cluster.policy.scaling.observe import Work
from ernie_cluster.policy.snapshot import Rates

if TYPE_CHECKING:  # torch, which the conductor need not import
    from ernie_cluster.engine.snapshot import WorkerSnapshot


def load_of(now: WorkerSnapshot, duty: Duty, token_bytes: int, num_opening: int = 0) -> Load:
    """`token_bytes` as in `Load`; `num_opening` prompts are not in the engine yet."""
    return Load(
        num_running=now.num_running,
        num_waiting=now.num_waiting,
        waiting_tokens=now.waiting_tokens,
        num_leases=now.num_leases,
        free_blocks=now.free_blocks,
        total_blocks=now.total_blocks,
        experts=now.experts,
        rates=_rates(now),
        token_bytes=token_bytes,
        role=duty.role,
        is_draining=duty.is_draining,
        is_leaving=duty.is_leaving,
        within_s=duty.within_s,
        num_prompts=now.num_prompts + num_opening,
        num_answers=now.num_answers,
        is_lending=now.is_lending,
        work=Work(
            int(now.has_read.n), now.prompt_tokens, now.generated_tokens, now.has_read, now.has_written, now.written
        ),
    )


def _rates(now: WorkerSnapshot) -> Rates:
    """What was measured; a guess for the rest."""
    guess = Rates()
    chunk_s, token_s = now.reading or (guess.chunk_s, guess.token_s)
    step_s, sequence_s = now.writing or (guess.step_s, guess.sequence_s)
    return Rates(chunk_s=chunk_s, token_s=token_s, step_s=step_s, sequence_s=sequence_s)
