"""What a scaling loop would have measured in the replay since it last looked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ernie_cluster.config.scaling import ScalingConfig
from ernie_cluster.policy.replay.machine import Job, SimReplica
from ernie_cluster.policy.scaling.observe import Tally, p90
from ernie_cluster.policy.scaling.snapshot import ModelState, ReplicaState, ScalingSnapshot, StageStats
from ernie_cluster.sums import Sums


@dataclass(slots=True)
class Observer:
    """Counts between two looks."""

    at_s: float = 0.0
    _tallies: defaultdict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    _busy_s: dict[str, float] = field(default_factory=dict)
    """When each model was last seen busy."""

    def offered(self, job: Job) -> None:
        """A request came, whatever became of it."""
        tally = self._tallies[job.model]
        tally.requests += 1
        tally.prompt_tokens += job.prompt_tokens
        tally.pictures += bool(job.media_tokens)
        tally.media_tokens += job.media_tokens

    def began(self, job: Job) -> None:
        """Its first token came."""
        self._tallies[job.model].ttft_s.append(job.ttft_s)

    def ended(self, job: Job) -> None:
        """Its last token came."""
        self._tallies[job.model].tpot_s.append(job.tpot_s)

    def snapshot(
        self, config: ScalingConfig, replicas: Iterable[SimReplica], held: Mapping[str, int], now_s: float
    ) -> ScalingSnapshot:
        """What there is to see now; begins to count anew."""
        seconds = max(now_s - self.at_s, 1e-9)
        self.at_s = now_s
        by_model: defaultdict[str, list[SimReplica]] = defaultdict(list)
        for replica in replicas:
            by_model[replica.model].append(replica)
        states = tuple(
            self._model(m.name, by_model[m.name], held.get(m.name, 0), seconds, now_s) for m in config.models
        )
        self._tallies.clear()
        return ScalingSnapshot(states)

    def _model(self, name: str, replicas: list[SimReplica], held: int, seconds: float, now_s: float) -> ModelState:
        tally = self._tallies[name]
        if held or tally.requests or any(not r.is_drained for r in replicas):
            self._busy_s[name] = now_s
        running = sum(len(r.batch) for r in replicas)
        emitted = sum(len(r.batch) / r.step_s() for r in replicas if r.batch)
        prompts, pictures, steps = Sums(), Sums(), Sums()
        for r in replicas:
            if r.samples.n:
                if r.role == "vision":
                    pictures += r.samples
                else:
                    prompts += r.samples
                r.samples = Sums()
            if r.batch and not r.queue:
                steps += Sums.of((r.batch_kv, r.step_s()))
        return ModelState(
            name=name,
            replicas=tuple(
                ReplicaState(r.replica_id, r.role, r.gpus, r.phase, r.queued_tokens + r.leased_kv) for r in replicas
            ),
            prefill=StageStats(
                tally.requests / seconds,
                tally.prompt_tokens / seconds,
                sum(r.queued_tokens for r in replicas if r.role != "vision"),
                p90(tally.ttft_s),
                prompts,
            ),
            decode=StageStats(tally.requests / seconds, emitted, 0.0, p90(tally.tpot_s), steps),
            vision=StageStats(
                tally.pictures / seconds,
                tally.media_tokens / seconds,
                sum(r.queued_tokens for r in replicas if r.role == "vision"),
                None,
                pictures,
            ),
            kv_tokens=replicas[0].costs.kv_tokens if replicas else 0.0,
            context_tokens=sum(r.batch_kv for r in replicas) / running if running else 0.0,
            num_held=held,
            idle_s=now_s - self._busy_s.setdefault(name, now_s),
        )
