"""The replay: requests are served as the costs say, the same each time, and scaling does there what it is for."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from ernie_cluster.config.router import RouterConfig
from ernie_cluster.config.scaling import ModelBounds, PoolBounds, ScalingConfig, ScalingPace, Targets
from ernie_cluster.policy.replay.machine import Costs, Job
from ernie_cluster.policy.replay.replay import Fleet, Replay, Result
from ernie_cluster.policy.replay.routes import LeastLoaded, PolicyRoute
from ernie_cluster.policy.replay.workload import LoadPhase, jobs_of, merged
from ernie_cluster.policy.scaling.actions import MoveGpus, ScaleToZero, SwitchRole, WakeUp

COSTS = Costs(
    base_s=0.01,
    per_kv_token_s=1e-6,
    per_prompt_token_s=1e-4,
    chunk_tokens=100,
    kv_tokens=40_000,
    transfer_token_s=1e-6,
    per_media_token_s=1e-3,
    start_s=5.0,
)
TARGETS = Targets(ttft_s=1.0, tpot_s=0.02, queue_s=0.5)
ROLES = ("prefill", "decode", "mixed", "vision")


def limits(*roles: str, total_gpus: float = 4.0, **fields: object) -> ScalingConfig:
    pools = tuple(PoolBounds(r, 1.0) for r in roles or ROLES)  # type: ignore[arg-type]
    return ScalingConfig((ModelBounds("m", pools, TARGETS, **fields),), total_gpus)  # type: ignore[arg-type]


def replay(config: ScalingConfig, *, is_scaling: bool = False) -> Replay:
    return Replay({m.name: COSTS for m in config.models}, PolicyRoute(), config, is_scaling=is_scaling)


@pytest.mark.parametrize("fleet", [{"m": {"prefill": 1, "decode": 1, "vision": 1}}, {"m": {"mixed": 1, "vision": 1}}])
def test_a_lone_request_takes_what_its_steps_take(fleet: Fleet) -> None:
    job = Job(0, "m", 0.5, prompt_tokens=200, output_tokens=11, media_tokens=50)
    (done,) = replay(limits()).run([job], fleet).jobs
    encode_s, prefill_s = 0.05, 2 * (0.01 + 0.01)
    assert done.ttft_s == pytest.approx(encode_s + prefill_s, abs=1e-5)
    transfer_s = 0.0 if "mixed" in fleet["m"] else 200e-6
    assert done.done_s - done.first_s == pytest.approx(transfer_s + 10 * (0.01 + 205.5e-6), abs=1e-5)


def test_answers_share_a_replica_and_slow_each_other() -> None:
    jobs = [Job(i, "m", 0.0, 1000, 101) for i in range(4)]
    (fast, *_), crowd = (
        replay(limits()).run([replace(j) for j in some], {"m": {"prefill": 4, "decode": 1}}).jobs
        for some in (jobs[:1], jobs)
    )
    assert all(j.tpot_s > 1.2 * fast.tpot_s for j in crowd)


def test_prompts_hold_up_the_answers_of_a_mixed_replica() -> None:
    def slowest(fleet: Fleet) -> float:
        jobs = list(jobs_of([LoadPhase(20, 2.0, 1000, 50)], seed=1))
        return max(j.tpot_s for j in replay(limits()).run(jobs, fleet).jobs)

    assert slowest({"m": {"mixed": 2}}) > 1.2 * slowest({"m": {"prefill": 1, "decode": 1}})


@pytest.mark.parametrize(
    "route", [PolicyRoute(RouterConfig(max_queued_tokens=3000)), LeastLoaded(RouterConfig(max_queued_tokens=3000))]
)
def test_a_full_queue_refuses(route: PolicyRoute | LeastLoaded) -> None:
    run = Replay({"m": COSTS}, route, limits(), is_scaling=False)
    jobs = run.run([Job(i, "m", 0.0, 1000, 2) for i in range(9)], {"m": {"prefill": 2, "decode": 1}}).jobs
    assert sum(j.is_refused for j in jobs) == 3
    assert all(math.isfinite(j.done_s) for j in jobs if not j.is_refused)


SHIFT = [LoadPhase(40, 10.0, 1000, 20), LoadPhase(80, 5.0, 300, 500), LoadPhase(40, 10.0, 1000, 20)]


def shifted(*, is_scaling: bool, prefill: int = 2) -> Result:
    run = replay(limits("prefill", "decode"), is_scaling=is_scaling)
    return run.run(jobs_of(SHIFT, seed=3), {"m": {"prefill": prefill, "decode": 4 - prefill}})


def test_switching_roles_beats_every_fixed_split() -> None:
    switching = shifted(is_scaling=True)
    fixed = [shifted(is_scaling=False, prefill=p).goodput(1.0, 0.02) for p in (1, 2, 3)]
    assert switching.goodput(1.0, 0.02) > 1.1 * max(fixed)
    assert {type(a) for _, a in switching.actions} == {SwitchRole}
    assert switching.most_gpus <= 4


def test_the_same_seed_gives_the_same_run() -> None:
    first, second = shifted(is_scaling=True), shifted(is_scaling=True)
    assert [(j.first_s, j.done_s) for j in first.jobs] == [(j.first_s, j.done_s) for j in second.jobs]
    assert [t for t, _ in first.actions] == [t for t, _ in second.actions]


@pytest.mark.parametrize("seed", range(3))
def test_constant_load_by_chance_is_no_reason_to_switch_to_and_fro(seed: int) -> None:
    run = replay(limits("prefill", "decode", total_gpus=6), is_scaling=True)
    result = run.run(jobs_of([LoadPhase(200, 7.0, 1000, 60)], seed), {"m": {"prefill": 3, "decode": 3}})
    switches = [a for _, a in result.actions if isinstance(a, SwitchRole)]
    assert len({(a.source, a.target) for a in switches}) <= 1


def test_a_sleeping_model_wakes_and_serves_all_who_waited() -> None:
    config = limits("prefill", "decode", floor=0, idle_to_zero_s=10.0)
    phases = [LoadPhase(5, 2.0, 200, 10), LoadPhase(40, 0.0, 1, 1), LoadPhase(5, 2.0, 200, 10)]
    result = replay(config, is_scaling=True).run(jobs_of(phases, 1), {"m": {"prefill": 1, "decode": 1}})
    kinds = [type(a) for _, a in result.actions]
    assert ScaleToZero in kinds
    assert WakeUp in kinds[kinds.index(ScaleToZero) :]
    assert all(math.isfinite(j.done_s) for j in result.jobs)


def test_gpus_move_to_the_model_that_needs_them() -> None:
    pools = (PoolBounds("prefill", 1.0), PoolBounds("decode", 1.0))
    config = ScalingConfig(tuple(ModelBounds(n, pools, TARGETS) for n in ("m", "n")), 8.0, ScalingPace(memory_s=10.0))
    first = list(jobs_of([LoadPhase(100, 1.0, 300, 20)], 1))
    second = list(jobs_of([LoadPhase(20, 1.0, 300, 20, model="n"), LoadPhase(80, 16.0, 1000, 20, model="n")], 2))
    result = replay(config, is_scaling=True).run(merged(first, second), {n: {"prefill": 2, "decode": 2} for n in "mn"})
    moves = [a for _, a in result.actions if isinstance(a, MoveGpus)]
    assert moves
    assert all((a.model, s.model) == ("n", "m") for a in moves for s in a.stops)
    assert result.most_gpus <= 8
    _, counts = result.counts[-1]
    assert counts["n", "prefill"] >= 3
