"""The plan in the process of Serve's controller, and the policy that follows it."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle

from ernie_cluster.actors import planned
from ernie_cluster.actors.plan_reader import Reader, State
from ernie_cluster.policy.scaling.plan import Plan, PoolKey

POOL: PoolKey = ("m", "decode")


class Router:
    """Answers `exchange` with a plan, and keeps what it was told."""

    def __init__(self, plan: Plan | None) -> None:
        self.plan, self.told = plan, list[tuple[State, Plan | None]]()

    def exchange(self, state: State, kept: Plan | None) -> Plan | None:
        self.told.append((state, kept))
        return self.plan


def context(target: int, *running: str) -> Any:
    return SimpleNamespace(target_num_replicas=target, running_replicas=[SimpleNamespace(unique_id=r) for r in running])


def test_a_plan_is_read_with_what_serve_knows_and_told_back() -> None:
    router = Router(None)
    reader = Reader(router.exchange)
    reader.put(POOL, 2, ("m/decode/a",))
    reader.read()
    assert reader.get(time.monotonic()) is None
    router.plan = Plan({POOL: 3})
    reader.read()
    reader.read()
    assert reader.get(time.monotonic()) == router.plan
    assert router.told == [({POOL: (2, ("m/decode/a",))}, kept) for kept in (None, None, router.plan)]


def test_an_old_plan_is_not_followed() -> None:
    reader = Reader(Router(Plan({POOL: 3})).exchange)
    reader.read()
    assert reader.get(time.monotonic() + 60) is None


def test_a_pool_is_as_large_as_planned_and_with_those_that_still_have_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    router = Router(Plan({POOL: 1}, stopping=frozenset({"m/decode/b"})))
    reader = Reader(router.exchange)
    monkeypatch.setattr(planned, "reader_of", lambda *_: reader)
    policy = planned.PlannedReplicas("app:router", "life", *POOL)
    assert policy(context(5, "a", "b")) == (5, {})  # nobody knows better yet
    reader.read()
    assert policy(context(5, "a", "b")) == (2, {})
    assert policy(context(2, "a")) == (1, {})
    assert router.told[0][0] == {POOL: (5, ("m/decode/a", "m/decode/b"))}


def test_a_controller_that_was_started_again_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader(Router(Plan({POOL: 1}, stopping=frozenset({"m/decode/b"}))).exchange)
    monkeypatch.setattr(planned, "reader_of", lambda *_: reader)
    policy = planned.PlannedReplicas("app:router", "life", *POOL)
    reader.read()
    assert [policy(context(2, *running))[0] for running in ((), ("a",), ("a", "b"), ("a",))] == [2, 2, 2, 1]


def test_serve_can_pickle_the_policy_by_value() -> None:
    cloudpickle.register_pickle_by_value(planned)
    try:
        assert cloudpickle.loads(cloudpickle.dumps(planned.PlannedReplicas)).__name__ == "PlannedReplicas"
    finally:
        cloudpickle.unregister_pickle_by_value(planned)
    assert f"{planned.__name__}:PlannedReplicas" == planned.PLANNED_REPLICAS
