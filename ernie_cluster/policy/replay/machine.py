"""Replicas in the replay: what steps cost, and queues and batches that flow between events instead of stepping.

Between two events the composition of a replica's steps does not change, so all of them take the same time: the batch
advances one token per step, the first prompt of the queue one chunk. A replica's next event is thus known in advance.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass, field

from ernie_cluster.config.pool import Role
from ernie_cluster.policy.scaling.snapshot import Phase
from ernie_cluster.sums import Sums

_EPSILON = 1e-7
"""Tokens, of rounding."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Of a replica's steps: base + KV tokens read + prompt tokens of a chunk, added up."""

    base_s: float
    """Weights are read, whatever the step holds."""
    per_kv_token_s: float
    per_prompt_token_s: float
    chunk_tokens: int
    """Prompt tokens per step, at most."""
    kv_tokens: int
    """That a replica holds."""
    transfer_token_s: float = 0.0
    """KV of a prompt token from prefill to decode, beyond what is hidden behind computing."""
    per_media_token_s: float = 0.0
    """Encoding, on a vision replica."""
    start_s: float = 60.0
    """From a start to the first request."""

    def prefill_rate(self) -> float:
        """Prompt tokens per second of a replica that does nothing else."""
        return self.chunk_tokens / (self.base_s + self.chunk_tokens * self.per_prompt_token_s)

    def step_s(self, kv_tokens: float) -> float:
        """Of a decode step."""
        return self.base_s + kv_tokens * self.per_kv_token_s


@dataclass(slots=True)
class Job:
    """One request in the replay."""

    number: int
    model: str
    arrived_s: float
    prompt_tokens: int
    output_tokens: int
    media_tokens: int = 0
    left: float = 0.0
    """Prompt (on a vision replica: media) tokens to be computed."""
    begun_s: float = 0.0
    """When its stage began to compute it."""
    first_s: float = math.inf
    """When its first token came."""
    done_s: float = math.inf
    is_refused: bool = False
    decode: SimReplica | None = None
    """Who holds room for it."""
    prefill: SimReplica | None = None

    @property
    def kv_tokens(self) -> int:
        """That it takes at its end."""
        return self.prompt_tokens + self.output_tokens

    @property
    def mean_kv_tokens(self) -> float:
        return self.prompt_tokens + self.output_tokens / 2

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.arrived_s

    @property
    def tpot_s(self) -> float:
        return (self.done_s - self.first_s) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0


@dataclass(slots=True, eq=False)
class SimReplica:
    """One replica."""

    replica_id: str
    model: str
    role: Role
    gpus: float
    costs: Costs
    phase: Phase = "ready"
    queue: deque[Job] = field(default_factory=deque)
    queued_tokens: float = 0.0
    """Of the queue, as of the last event; promised prompts included."""
    batch: list[tuple[float, int, Job]] = field(default_factory=list)
    """Heap by the step at which each ends."""
    steps: float = 0.0
    batch_kv: float = 0.0
    """KV tokens that a step reads."""
    leased_kv: float = 0.0
    """KV tokens of requests that run here or will."""
    at_s: float = 0.0
    version: int = 0
    """Another one whenever its next event changes."""
    samples: Sums = Sums()
    """Of prompts or pictures computed since the last look."""

    @property
    def serves(self) -> bool:
        """Whether it takes new work."""
        return self.phase in ("ready", "switching")

    @property
    def is_drained(self) -> bool:
        """Whether nothing is left to do, or while it switches, nothing of its former work."""
        has_prompts, has_answers = bool(self.queue) or self.queued_tokens > _EPSILON, self.leased_kv > _EPSILON
        if self.phase == "switching" and self.role != "mixed":
            return not (has_answers if self.role == "prefill" else has_prompts)
        return self.phase == "switching" or not (has_prompts or has_answers)

    @property
    def free_kv(self) -> float:
        return self.costs.kv_tokens - self.leased_kv

    def step_s(self) -> float:
        costs = self.costs
        chunk = costs.chunk_tokens * costs.per_prompt_token_s if self.queue else 0.0
        return costs.step_s(self.batch_kv) + chunk

    def advance(self, now_s: float) -> list[Job]:
        """Let time pass; prompts, pictures or answers that end just now."""
        done: list[Job] = []
        passed, self.at_s = now_s - self.at_s, now_s
        if self.role == "vision":
            return self._encode(passed)
        if not (self.queue or self.batch):
            return done
        steps = passed / self.step_s()
        self.steps += steps
        if self.queue:
            head = self.queue[0]
            progress = min(head.left, steps * self.costs.chunk_tokens)
            head.left -= progress
            self.queued_tokens -= progress
            if head.left < _EPSILON * self.costs.chunk_tokens:
                done.append(self._prefilled(now_s))
        while self.batch and self.batch[0][0] <= self.steps + _EPSILON:
            _, _, job = heapq.heappop(self.batch)
            self.batch_kv -= job.mean_kv_tokens
            self.leased_kv -= job.kv_tokens
            job.done_s = now_s
            done.append(job)
        return done

    def next_s(self) -> float:
        """Time of the next event as things are, infinite when nothing is to be done."""
        if self.role == "vision":
            return self.at_s + self.queue[0].left * self.costs.per_media_token_s if self.queue else math.inf
        steps = math.inf
        if self.queue:
            steps = self.queue[0].left / self.costs.chunk_tokens
        if self.batch:
            steps = min(steps, self.batch[0][0] - self.steps)
        return self.at_s + max(0.0, steps) * self.step_s() if math.isfinite(steps) else math.inf

    def enqueue(self, job: Job, now_s: float) -> None:
        """Take a prompt or picture; `left` and `queued_tokens` know of it already."""
        if not self.queue:
            job.begun_s = now_s
        self.queue.append(job)

    def start_decode(self, job: Job) -> None:
        """Take up an answer, whose KV is leased."""
        heapq.heappush(self.batch, (self.steps + job.output_tokens - 1, job.number, job))
        self.batch_kv += job.mean_kv_tokens

    def _encode(self, passed: float) -> list[Job]:
        if not self.queue:
            return []
        head = self.queue[0]
        progress = min(head.left, passed / self.costs.per_media_token_s)
        head.left -= progress
        self.queued_tokens -= progress
        return [self._prefilled(self.at_s)] if head.left < _EPSILON else []

    def _prefilled(self, now_s: float) -> Job:
        """End the first of the queue, and measure it: of steps that answers shared, the part that its chunks took."""
        chunk_s = self.costs.chunk_tokens * self.costs.per_prompt_token_s
        part = chunk_s / self.step_s() if self.batch else 1.0
        job = self.queue.popleft()
        self.queued_tokens -= job.left
        job.left = 0.0
        tokens = job.media_tokens if self.role == "vision" else job.prompt_tokens
        self.samples = self.samples + Sums.of((float(tokens), part * (now_s - job.begun_s)))
        if self.queue:
            self.queue[0].begun_s = now_s
        return job
