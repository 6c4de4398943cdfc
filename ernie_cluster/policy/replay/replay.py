"""A cluster on paper: requests, routing, scaling and replicas in one event loop, in no time. Deterministic.

What it leaves out: the network between API and replicas, snapshots that are late, prefix caches, preemption, failures.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ernie_cluster.config.pool import Role
from ernie_cluster.config.scaling import ScalingConfig
from ernie_cluster.policy.replay.machine import Costs, Job, SimReplica
from ernie_cluster.policy.replay.observe import Observer
from ernie_cluster.policy.replay.routes import Route
from ernie_cluster.policy.scaling.actions import (
    Action,
    MoveGpus,
    ScaleIn,
    ScaleOut,
    ScaleToZero,
    SwitchRole,
    WakeUp,
)
from ernie_cluster.policy.scaling.decide import decide
from ernie_cluster.policy.scaling.memory import Memory

ROLES: tuple[Role, ...] = ("vision", "prefill", "decode", "mixed")
Fleet = Mapping[str, Mapping[Role, int]]
"""Ready replicas at the start, by model and role."""


@dataclass(slots=True)
class Result:
    """What happened."""

    jobs: list[Job]
    """Every request, in the order of arrival."""
    actions: list[tuple[float, Action]]
    counts: list[tuple[float, dict[tuple[str, Role], int]]]
    """Replicas that do each role, at each look."""
    most_gpus: float
    """That were held at the same time."""

    def goodput(self, ttft_s: float, tpot_s: float) -> float:
        """Part of the requests that kept both targets; those refused did not."""
        good = sum(not j.is_refused and j.ttft_s <= ttft_s and j.tpot_s <= tpot_s for j in self.jobs)
        return good / len(self.jobs) if self.jobs else 1.0


@dataclass(slots=True)
class Replay:
    """One run."""

    costs: Mapping[str, Costs]
    """By model."""
    route: Route
    config: ScalingConfig
    """Also says how many GPUs each role holds."""
    is_scaling: bool = True
    """Whether decisions are carried out."""
    interval_s: float = 1.0
    """From one decision to the next."""
    grace_s: float = 120.0
    """After the last arrival: what has not ended by then has missed its targets."""
    now_s: float = 0.0
    replicas: dict[str, SimReplica] = field(default_factory=dict)
    result: Result = field(default_factory=lambda: Result([], [], [], 0.0))
    _ready: dict[str, dict[Role, list[SimReplica]]] = field(default_factory=dict)
    _events: list[tuple[float, int, str, object]] = field(default_factory=list)
    _order: itertools.count[int] = field(default_factory=itertools.count)
    _held: dict[str, list[Job]] = field(default_factory=dict)
    _planned: list[tuple[SimReplica, frozenset[str]]] = field(default_factory=list)
    """Replicas that wait for others to stop."""

    def run(self, jobs: Iterable[Job], fleet: Fleet) -> Result:
        """Serve the requests with the replicas of `fleet`, which change as decided."""
        for bounds in self.config.models:
            self._ready[bounds.name] = {role: [] for role in ROLES}
            self._held[bounds.name] = []
            for role, count in fleet.get(bounds.name, {}).items():
                for _ in range(count):
                    self._add(bounds.name, role).phase = "ready"
        self._refresh()
        observer, memory = Observer(), Memory()
        arrivals = iter(jobs)
        last_s = self._arrival(arrivals)
        self._push(0.0, "look", None)
        while self._events:
            self.now_s, _, kind, what = heapq.heappop(self._events)
            if kind == "engine":
                assert isinstance(what, tuple)
                if what[0].version == what[1]:
                    self._step(what[0], observer)
            elif kind == "arrival":
                assert isinstance(what, Job)
                last_s = self._arrival(arrivals) or last_s
                self._admit(what, observer)
            elif kind == "decode":
                assert isinstance(what, Job)
                self._begin_decode(what, observer)
            elif kind == "started":
                assert isinstance(what, SimReplica)
                self._started(what, observer)
            else:
                memory = self._look(observer, memory)
                if self.now_s < last_s + self.grace_s and (self.now_s <= last_s or self._is_busy()):
                    self._push(self.now_s + self.interval_s, "look", None)
        return self.result

    def _arrival(self, arrivals: Iterable[Job]) -> float:
        job = next(iter(arrivals), None)
        if job is None:
            return 0.0
        self.result.jobs.append(job)
        self._push(job.arrived_s, "arrival", job)
        return job.arrived_s

    def _push(self, at_s: float, kind: str, what: object) -> None:
        heapq.heappush(self._events, (at_s, next(self._order), kind, what))

    def _is_busy(self) -> bool:
        return any(not r.is_drained for r in self.replicas.values()) or any(self._held.values())

    def _admit(self, job: Job, observer: Observer) -> None:
        observer.offered(job)
        self._send(job, observer)

    def _send(self, job: Job, observer: Observer) -> None:
        """Book the whole path, hold the request where its model sleeps, or refuse it."""
        if not any(
            r.model == job.model and r.role != "vision" and r.phase != "draining" for r in self.replicas.values()
        ):
            self._held[job.model].append(job)
            return
        chosen = self.route(job, self._ready[job.model])
        if chosen is None:
            job.is_refused = not self._is_waking(job)
            if not job.is_refused:
                self._held[job.model].append(job)
            return
        encoder, job.prefill, job.decode = chosen
        job.decode.leased_kv += job.kv_tokens
        job.prefill.queued_tokens += job.prompt_tokens
        if encoder is None:
            self._prefill(job, observer)
            return
        encoder.queued_tokens += job.media_tokens
        self._touch(encoder, observer)
        job.left = job.media_tokens
        encoder.enqueue(job, self.now_s)
        self._schedule(encoder)

    def _is_waking(self, job: Job) -> bool:
        """Whether its model has nobody yet that could serve it."""
        ready = self._ready[job.model]
        return not (ready["mixed"] or (ready["prefill"] and ready["decode"]))

    def _prefill(self, job: Job, observer: Observer) -> None:
        assert job.prefill is not None
        self._touch(job.prefill, observer)
        job.left = job.prompt_tokens
        job.prefill.enqueue(job, self.now_s)
        self._schedule(job.prefill)

    def _step(self, replica: SimReplica, observer: Observer) -> None:
        self._touch(replica, observer)
        self._schedule(replica)
        if replica.phase in ("switching", "draining"):
            self._settle(replica, observer)

    def _touch(self, replica: SimReplica, observer: Observer) -> None:
        """Bring a replica up to now, and send on what it finished."""
        for job in replica.advance(self.now_s):
            if math.isfinite(job.done_s):
                observer.ended(job)
            elif replica.role == "vision":
                self._prefill(job, observer)
            else:
                self._first_token(job, observer)

    def _first_token(self, job: Job, observer: Observer) -> None:
        assert job.prefill is not None
        assert job.decode is not None
        job.first_s = self.now_s
        observer.began(job)
        if job.output_tokens <= 1:
            job.done_s = self.now_s
            job.decode.leased_kv -= job.kv_tokens
        elif job.decode is job.prefill:
            job.decode.start_decode(job)
        else:
            delay_s = job.prompt_tokens * self.costs[job.model].transfer_token_s
            self._push(self.now_s + delay_s, "decode", job)

    def _begin_decode(self, job: Job, observer: Observer) -> None:
        assert job.decode is not None
        self._touch(job.decode, observer)
        job.decode.start_decode(job)
        self._schedule(job.decode)

    def _schedule(self, replica: SimReplica) -> None:
        replica.version += 1
        at_s = replica.next_s()
        if math.isfinite(at_s):
            self._push(max(at_s, self.now_s), "engine", (replica, replica.version))

    def _look(self, observer: Observer, memory: Memory) -> Memory:
        for replica in list(self.replicas.values()):
            if replica.phase in ("switching", "draining"):
                self._settle(replica, observer)
        held = {name: len(jobs) for name, jobs in self._held.items()}
        snapshot = observer.snapshot(self.config, self.replicas.values(), held, self.now_s)
        decision = decide(snapshot, self.config, memory, self.now_s)
        counts = Counter((r.model, r.role) for r in self.replicas.values() if r.phase != "draining")
        self.result.counts.append((self.now_s, dict(counts)))
        if self.is_scaling:
            for action in decision.actions:
                self.result.actions.append((self.now_s, action))
                self._carry_out(action)
            self._refresh()
        gpus = math.fsum(r.gpus for r in self.replicas.values() if r.phase != "planned")
        self.result.most_gpus = max(self.result.most_gpus, gpus)
        return decision.memory

    def _carry_out(self, action: Action) -> None:
        if isinstance(action, SwitchRole):
            for replica_id in action.replica_ids:
                replica = self.replicas[replica_id]
                if replica.phase == "ready":
                    replica.phase = "switching"
                replica.role = action.target
        elif isinstance(action, ScaleOut):
            for _ in range(action.count):
                self._start(self._add(action.model, action.role))
        elif isinstance(action, WakeUp):
            for role in action.roles:
                self._start(self._add(action.model, role))
        elif isinstance(action, (ScaleIn, ScaleToZero)):
            for replica_id in action.replica_ids:
                self._drain(replica_id)
        elif isinstance(action, MoveGpus):
            for stop in action.stops:
                self._drain(stop.replica_id)
            waits_for = frozenset(s.replica_id for s in action.stops if s.replica_id in self.replicas)
            self._planned.append((self._add(action.model, action.role), waits_for))

    def _add(self, model: str, role: Role) -> SimReplica:
        pool = next(m for m in self.config.models if m.name == model).pool(role)
        assert pool is not None, f"{model} has no {role} pool"
        replica_id = f"{model}/{next(self._order):06d}"
        replica = SimReplica(replica_id, model, role, pool.gpus, self.costs[model], "planned", at_s=self.now_s)
        self.replicas[replica_id] = replica
        return replica

    def _start(self, replica: SimReplica) -> None:
        replica.phase = "starting"
        self._push(self.now_s + replica.costs.start_s, "started", replica)

    def _started(self, replica: SimReplica, observer: Observer) -> None:
        if replica.phase != "starting":
            return
        replica.phase, replica.at_s = "ready", self.now_s
        self._refresh()
        held, self._held[replica.model] = self._held[replica.model], []
        for job in held:
            self._send(job, observer)

    def _drain(self, replica_id: str) -> None:
        replica = self.replicas[replica_id]
        if replica.phase == "ready":
            replica.phase = "draining"
        else:
            del self.replicas[replica_id]
            replica.phase = "draining"

    def _settle(self, replica: SimReplica, observer: Observer) -> None:
        """End a switch or a stop whose work is done."""
        if not replica.is_drained:
            return
        if replica.phase == "switching":
            replica.phase = "ready"
        else:
            self.replicas.pop(replica.replica_id, None)
        for planned, waits_for in list(self._planned):
            if not waits_for & self.replicas.keys():
                self._planned.remove((planned, waits_for))
                if planned.replica_id in self.replicas:
                    self._start(planned)
        self._refresh()

    def _refresh(self) -> None:
        """Sort out who takes work."""
        for roles in self._ready.values():
            for group in roles.values():
                group.clear()
        for replica in self.replicas.values():
            if replica.serves:
                self._ready[replica.model][replica.role].append(replica)
