"""What a worker tells of its engine."""

from __future__ import annotations

from dataclasses import dataclass

from ernie_cluster.config.experts import ExpertUse
from ernie_cluster.engine.host_tier import TierUse
from ernie_cluster.engine.pace import Line
from ernie_cluster.sums import Sums


@dataclass(frozen=True, slots=True)
class WorkerSnapshot:
    """Load of one engine, at one moment."""

    num_running: int
    num_waiting: int
    waiting_tokens: int
    """Prompt tokens not computed yet."""
    num_leases: int
    free_blocks: int
    total_blocks: int
    steps: int
    run_s: float
    prompt_tokens: int
    generated_tokens: int
    preemptions: int
    kv_bytes_sent: int
    kv_bytes_received: int
    experts: ExpertUse | None = None
    """None in a model without experts."""
    reading: Line | None = None
    """Steps with tokens of prompts, by tokens; None before the first."""
    writing: Line | None = None
    """Steps in which each sequence gets one token, by sequences."""
    num_prompts: int = 0
    """Requests whose prompt is computed here, or handed over."""
    num_answers: int = 0
    """Requests that are decoded here, or whose KV is on its way."""
    is_lending: bool = False
    """Parts of the prefix cache are on their way to others, or are asked for soon by requests that had to leave."""
    has_read: Sums = Sums()
    """See `Counters.reading`."""
    has_written: Sums = Sums()
    """See `Counters.writing`."""
    written: int = 0
    """See `Counters.written`."""
    host_tier: TierUse | None = None
    """None without memory behind the KV cache."""
