"""What the autoscaler measures between two looks."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_cluster.policy.scaling.observe import Lane, Observer, Work
from ernie_cluster.policy.scaling.snapshot import ModelState, ReplicaState
from ernie_cluster.policy.snapshot import Demand, Promise
from ernie_cluster.policy.waiting import Held
from ernie_cluster.sums import Sums

READY = ReplicaState("m/mixed/a", "mixed")
LANE = Lane("m/mixed/a", "m/mixed/a", "m", "mixed", "life", kv_tokens=1000)


def look(
    observer: Observer,
    now_s: float,
    *lanes: Lane,
    held: int = 0,
    media: int = 0,
    replicas: tuple[ReplicaState, ...] = (READY,),
) -> ModelState:
    (state,) = observer.look({"m": replicas}, lanes, {"m": Held(held, media)}, now_s).models
    return state


def demand(tokens: int = 100, **more: int) -> Demand:
    return Demand("m", tokens, 10, **more)  # type: ignore[arg-type]


def work(prompts: int, tokens: int, output: int = 0, steps: int = 0) -> Work:
    """Steps of two sequences with 500 KV tokens each."""
    return Work(prompts, tokens, output, Sums.of(*[(tokens / prompts, 0.5)] * prompts), Sums.of(*[(1000.0, 0.02)] * steps), 2 * steps)  # fmt: skip


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 5)), min_size=1, max_size=6))
def test_what_was_done_between_looks_adds_up_to_all_of_it(batches: list[tuple[int, int]]) -> None:
    observer, total = Observer(0.0), Work()
    look(observer, 0.0, LANE)
    prefill, tokens, output = Sums(), 0.0, 0.0
    for second, (prompts, seconds) in enumerate(batches, 1):
        done = work(prompts, 10 * prompts, 3 * prompts, seconds)
        total = Work(total.num_prompts + done.num_prompts, total.prompt_tokens + done.prompt_tokens,
                     total.output_tokens + done.output_tokens, total.reading + done.reading,
                     total.writing + done.writing, total.written + done.written)  # fmt: skip
        for _ in range(prompts):
            observer.offered(demand(50), [Promise("m/mixed/a", tokens=10)])
        state = look(observer, float(second), replace(LANE, work=total))
        assert state.prefill.requests_per_s == pytest.approx(prompts)
        assert state.decode.samples.n == pytest.approx(seconds)
        assert state.context_tokens == pytest.approx(500)
        prefill, tokens = prefill + state.prefill.samples, tokens + state.prefill.tokens_per_s
        output += state.decode.tokens_per_s
    assert (prefill.n, prefill.x, tokens, output) == pytest.approx(
        (total.reading.n, total.reading.x, total.prompt_tokens, total.output_tokens)
    )


def test_what_a_replica_did_before_it_was_seen_counts_nowhere() -> None:
    observer, once = Observer(0.0), work(1000, 100_000, 10_000, 500)
    for second, life in ((1.0, "life"), (2.0, "another")):  # of a router that has just begun, and later
        state = look(observer, second, replace(LANE, incarnation=life, work=once))
        assert (state.prefill.samples.n, state.decode.samples.n, state.decode.tokens_per_s) == (0, 0, 0)
    more = Work(1001, 100_050, 10_005, once.reading + Sums.of((50.0, 0.5)), once.writing, once.written)
    state = look(observer, 3.0, replace(LANE, incarnation="another", work=more))
    assert (state.prefill.samples.n, state.decode.tokens_per_s) == (1, 5)


def test_pictures_of_those_who_wait_are_vision_work_where_nobody_encodes() -> None:
    assert look(Observer(0.0), 1.0, LANE, held=2, media=300).vision.backlog_tokens == 300
    eye = replace(LANE, lane_id="m/vision/a", gang="m/vision/a", role="vision", backlog_tokens=7)
    assert look(Observer(0.0), 1.0, LANE, eye, held=2, media=300).vision.backlog_tokens == 7


def test_who_runs_and_cannot_be_reached_is_not_idle() -> None:
    observer = Observer(0.0)
    silent = ReplicaState("m/mixed/a", "mixed", phase="silent")
    assert look(observer, 1.0, replicas=(silent,)).idle_s == 0
    assert look(observer, 2.0, replicas=(silent,)).idle_s == 0


def test_of_a_refused_prompt_the_caches_hold_as_much_as_usual() -> None:
    observer = Observer(0.0)
    observer.offered(demand(100), None)
    assert look(observer, 1.0).prefill.tokens_per_s == 100  # nothing is known yet
    observer.offered(demand(100), [Promise("m/mixed/a", tokens=25)])
    observer.offered(demand(200), None)
    state = look(observer, 2.0)
    assert (state.prefill.requests_per_s, state.prefill.tokens_per_s) == (2, 25 + 50)


def test_what_clients_saw_is_the_ninth_decile() -> None:
    observer = Observer(0.0)
    for i in range(1, 11):
        observer.ended("m", float(i), 0.1 * i)
    observer.ended("m", None, None)
    state = look(observer, 1.0)
    assert state.prefill.latency_p90_s == 9.0
    assert state.decode.latency_p90_s == pytest.approx(0.9)
    assert look(observer, 2.0).prefill.latency_p90_s is None


def test_idle_is_who_has_nothing_and_expects_nothing() -> None:
    observer = Observer(0.0)
    coming = ReplicaState("starting/0/mixed", "mixed", phase="starting")
    assert look(observer, 1.0, replicas=(coming,)).idle_s == 0
    assert look(observer, 2.0, replace(LANE, is_idle=False)).idle_s == 0
    assert look(observer, 5.0, LANE).idle_s == 3
    assert look(observer, 6.0, LANE, held=1).idle_s == 0
    observer.offered(demand(), None)
    assert look(observer, 7.0, LANE).idle_s == 0
    assert look(observer, 9.0, LANE).idle_s == 2


def test_a_replica_of_several_lanes_holds_what_they_hold_together() -> None:
    lanes = [replace(LANE, lane_id=f"m/mixed/{gang}/{i}", gang=f"m/mixed/{gang}") for gang in "ab" for i in range(2)]
    assert look(Observer(0.0), 1.0, *lanes).kv_tokens == 2000
