"""The autoscaler's loop over a played roster: what it orders, whom it lets end, and what it remembers when it begins anew."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any

import pytest

from ernie_cluster.actors.scaler import Scaler, ServeState
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.deployment import ModelDeployment
from ernie_cluster.config.pool import PoolConfig, Role
from ernie_cluster.config.scaling import AutoscalerConfig
from ernie_cluster.errors import OrderRefused
from ernie_cluster.policy.scaling.actions import SwitchRole
from ernie_cluster.policy.scaling.observe import Lane, Observer
from ernie_cluster.policy.scaling.plan import Gang, Plan
from ernie_cluster.policy.waiting import Held

LATER_S = 100.0
"""After which the sleepy model sleeps."""
POOLS = (PoolConfig("prefill"), PoolConfig("decode", num_replicas=2))
CONFIG = ClusterConfig(
    (
        ModelDeployment("m", "/nowhere", POOLS, switch_roles=True),
        ModelDeployment("sleepy", "/nowhere", (PoolConfig("mixed"),), floor=0, idle_to_zero_s=LATER_S),
    ),
    scaling=AutoscalerConfig(drain_timeout_s=300.0),
)
PINNED = replace(
    CONFIG,
    models=(
        replace(
            CONFIG.models[0],
            pools=tuple(replace(p, min_replicas=p.num_replicas, max_replicas=p.num_replicas) for p in POOLS),
        ),
        CONFIG.models[1],
    ),
    scaling=AutoscalerConfig(budget=CONFIG.budget + 2, down_delay_s=3.0),
)
"""Nobody may be added or stopped, and there are cores for more."""
GANGS = ("m/prefill/a", "m/decode/b", "m/decode/c", "sleepy/mixed/d")
SLEEPY = GANGS[-1]


def made(gang_id: str) -> Gang:
    model, role, _ = gang_id.split("/")
    return Gang(gang_id, model, role, role)  # type: ignore[arg-type]


class PlayedRoster:
    """Does what it is told at once, or never."""

    def __init__(self, gangs: Sequence[str]) -> None:
        self.there = {i: made(i) for i in gangs}
        self.told: list[tuple[str, object]] = []
        self.error: Exception | None = None
        self.done: set[str] = set()

    def roles(self, model: str) -> set[Role]:
        return {g.role for g in self.gangs() if g.model == model and not g.is_draining}

    def gangs(self) -> list[Gang]:
        return list(self.there.values())

    def lanes(self) -> list[Lane]:
        return [Lane(i, i, g.model, g.role, "life") for i, g in self.there.items()]

    def is_done(self, gang_id: str) -> bool:
        return gang_id in self.done

    async def tell(
        self, gang_id: str, *, role: Role | None = None, is_draining: bool | None = None, within_s: float | None = None
    ) -> None:
        self.told.append((gang_id, is_draining if role is None else role))
        if self.error is not None:
            raise self.error
        gang = self.there[gang_id]
        drains = gang.is_draining if is_draining is None else is_draining
        self.there[gang_id] = replace(gang, role=role or gang.role, is_draining=drains)


class Scene:
    """A scaler, its roster, and what Serve runs."""

    def __init__(self, gangs: Sequence[str] = GANGS, config: ClusterConfig = CONFIG) -> None:
        self.config, self.roster, self.running = config, PlayedRoster(gangs), list(GANGS)
        self.held: dict[str, Held] = {}
        self.begin()

    def begin(self) -> None:
        """As a router does that has just started."""
        self.start_s = time.monotonic()
        observer = Observer(self.start_s)
        self.scaler = Scaler(self.config, self.roster, observer, lambda: self.held)  # type: ignore[arg-type]

    def serve(self) -> ServeState:
        pools = {(m.name, p.role): (p.num_replicas, f"{m.name}/{p.role}/") for m in self.config.models for p in m.pools}
        return {key: (n, tuple(i for i in self.running if i.startswith(start))) for key, (n, start) in pools.items()}

    def exchange(self, kept: Plan | None = None) -> Plan:
        plan = self.scaler.exchange(self.serve(), kept)
        assert plan is not None
        return plan

    async def step(self, after_s: float) -> None:
        """A look, so long after the beginning; and the orders that come of it."""
        self.scaler.step(self.start_s + after_s)
        await asyncio.gather(*self.scaler._orders)

    @property
    def log(self) -> list[str]:
        return [entry.action for entry in self.scaler.log]


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


async def asleep(scene: Scene) -> Plan:
    """Until the sleepy model is to stop; the plan then."""
    scene.exchange()
    await scene.step(1)
    await scene.step(LATER_S + 2)
    assert scene.log == ["scale_to_zero"]
    return scene.exchange()


def test_nothing_is_decided_before_serve_has_told_of_all_pools() -> None:
    async def play() -> None:
        s = Scene()
        part = dict(list(s.serve().items())[:1])
        assert s.scaler.exchange(part, None) is None
        await s.step(1)
        await s.step(2 * LATER_S)
        assert (s.log, s.scaler.decision) == ([], None)
        assert s.exchange().counts == {("m", "prefill"): 1, ("m", "decode"): 2, ("sleepy", "mixed"): 1}

    run(play())


def test_a_stop_is_ordered_once_it_shows_and_ends_when_done() -> None:
    async def play() -> None:
        s = Scene()
        s.roster.error = TimeoutError()
        plan = await asleep(s)
        assert plan.stopping == {SLEEPY}
        assert plan.wanted(("sleepy", "mixed"), [SLEEPY]) == 1, "Serve is not to stop it"
        await s.step(LATER_S + 3)
        assert s.roster.told == [(SLEEPY, True)] * 2, "told again until it shows"
        s.roster.error = None
        await s.step(LATER_S + 4)
        await s.step(LATER_S + 5)
        assert s.roster.told == [(SLEEPY, True)] * 3
        assert not s.scaler.may_end(SLEEPY)
        s.roster.done = {SLEEPY, "m/decode/b"}
        assert s.scaler.may_end(SLEEPY)
        assert not s.scaler.may_end("m/decode/b"), "nobody wants it to end"
        del s.roster.there[SLEEPY]
        s.running.remove(SLEEPY)
        s.exchange()
        await s.step(LATER_S + 6)
        assert not s.exchange().stopping
        assert s.log == ["scale_to_zero"]

    run(play())


def test_who_does_not_finish_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play() -> None:
        s = Scene()
        await asleep(s)
        end_s = s.start_s + LATER_S + 2 + 300
        for now_s, may_end in ((end_s - 1, False), (end_s + 1, True)):
            monkeypatch.setattr("ernie_cluster.actors.scaler.time.monotonic", lambda now_s=now_s: now_s)
            assert s.scaler.may_end(SLEEPY) is may_end

    run(play())


def test_a_router_that_begins_anew_goes_on_with_what_was_begun() -> None:
    async def play() -> None:
        s = Scene()
        kept = await asleep(s)
        s.roster = PlayedRoster(())  # nobody has registered there
        s.begin()
        assert s.exchange(kept) == kept
        await s.step(1)
        phases = {r.replica_id: r.phase for state in s.scaler.looks[-1].models for r in state.replicas}
        assert phases == {i: "draining" if i == SLEEPY else "silent" for i in GANGS}
        assert (s.log, s.roster.told) == ([], [])
        s.roster.there = {i: made(i) for i in GANGS}
        await s.step(2)
        assert s.roster.told == [(SLEEPY, True)], "whoever had not heard of it hears of it now"
        plan = s.exchange(kept)
        assert (plan.stopping, dict(plan.counts), s.log) == (kept.stopping, dict(kept.counts), [])
        assert s.scaler._drained_by.keys() == {SLEEPY}, "it has a deadline again"

    run(play())


def test_a_model_that_sleeps_is_known_to_do_so_by_a_router_that_begins_anew() -> None:
    async def play() -> None:
        s = Scene()
        kept = await asleep(s)
        s.running.remove(SLEEPY)
        s.roster = PlayedRoster(GANGS[:-1])
        s.begin()
        assert not s.scaler.was_put_to_sleep("sleepy"), "nobody knows yet"
        s.exchange(kept)
        await s.step(1)
        assert s.scaler.was_put_to_sleep("sleepy")
        assert s.scaler.sleeps("sleepy")
        assert not s.scaler.was_put_to_sleep("m")
        s.held = {"sleepy": Held(1)}
        await s.step(2)
        assert s.log == ["wake_up"]
        assert not s.scaler.was_put_to_sleep("sleepy")
        await s.step(3)
        assert s.log == ["wake_up"], "once"
        assert s.exchange().counts["sleepy", "mixed"] == 1

    run(play())


def test_who_is_lost_for_a_while_is_neither_replaced_nor_stopped() -> None:
    async def play() -> None:
        s = Scene()
        before = s.exchange()
        await s.step(1)
        lost = s.roster.there.pop("m/decode/b")
        await s.step(2)
        assert s.exchange().counts == before.counts
        s.roster.there[lost.gang_id] = lost
        await s.step(3)
        assert (s.log, s.roster.told) == ([], [])

    run(play())


def test_an_operator_keeps_who_was_to_stop() -> None:
    async def play() -> None:
        s = Scene()
        await asleep(s)
        s.scaler.keep(s.roster.there[SLEEPY])
        s.roster.done = {SLEEPY}
        assert not s.scaler.may_end(SLEEPY)
        assert s.exchange().counts["sleepy", "mixed"] == 1
        assert s.scaler.phase(made(SLEEPY)) == "ready"

    run(play())


@pytest.mark.parametrize("error", [OrderRefused("no"), TimeoutError(), ConnectionError()])
def test_an_order_that_fails_harms_nobody(error: Exception) -> None:
    async def play() -> None:
        s = Scene()
        s.roster.error = error
        await asleep(s)
        assert not s.roster.there[SLEEPY].is_draining
        await s.step(LATER_S + 3)
        assert len(s.roster.told) == 2

    run(play())


def test_a_note_is_made_once_a_minute() -> None:
    async def play() -> None:
        s = Scene()
        s.exchange()
        await s.step(1)
        noted = []
        for now_s in (2.0, 3.0, 61.9, 62.1):
            s.scaler._note("m engines: short", s.start_s + now_s)
            noted.append(s.log.count("note"))
        assert noted == [1, 1, 1, 2]

    run(play())


def test_a_switch_is_told_to_those_who_are_there() -> None:
    async def play() -> None:
        s = Scene()
        s.exchange()
        await s.step(1)
        names = ("m/decode/b", "starting/0/decode")
        s.scaler._begin(SwitchRole("m", names, "decode", "prefill", "for a reason"), s.roster.gangs())
        await asyncio.gather(*s.scaler._orders)
        assert s.roster.told == [("m/decode/b", "prefill")]
        assert s.scaler.phase(s.roster.there["m/decode/b"]) == "switching"
        assert [(e.action, e.replicas) for e in s.scaler.log] == [("switch_role", names)]

    run(play())


def test_where_nothing_scales_it_only_looks() -> None:
    async def play() -> None:
        model = ModelDeployment("m", "/nowhere", POOLS, switch_roles=True)
        s = Scene(GANGS[:-1], ClusterConfig((model,)))
        s.scaler.switched(s.roster.there["m/decode/b"], s.start_s)
        s.roster.there["m/decode/b"] = replace(s.roster.there["m/decode/b"], role="prefill", num_answers=2)
        await s.step(1)
        assert s.scaler.phase(s.roster.there["m/decode/b"]) == "switching"
        s.roster.there["m/decode/b"] = replace(s.roster.there["m/decode/b"], num_answers=0)
        await s.step(2)
        assert s.scaler.phase(s.roster.there["m/decode/b"]) == "ready"
        assert (s.scaler.decision, s.log) == (None, [])

    run(play())


@pytest.mark.parametrize("why", ["drained", "restarted", "leaving"])
def test_more_is_started_for_one_that_drains_and_not_for_one_that_is_replaced(why: str) -> None:
    """Who ends by itself makes room for the one that Serve starts in its place."""
    name = "m/decode/b"

    async def play() -> None:
        s = Scene(config=PINNED)
        s.exchange()
        await s.step(1)
        gang = s.roster.there[name]
        s.roster.there[name] = replace(gang, is_draining=True, is_leaving=why == "leaving")
        if why == "restarted":
            s.scaler.restart(gang, s.start_s + 60)
        await s.step(2)
        assert s.scaler.phase(s.roster.there[name]) == "draining"
        assert s.log == (["scale_out"] if why == "drained" else [])
        assert [r.role for m, r in s.scaler.coming() if m == "m"] == ["decode"]
        del s.roster.there[name]
        s.running.remove(name)
        s.exchange()
        await s.step(3)
        assert s.exchange().counts["m", "decode"] == (3 if why == "drained" else 2)

    run(play())


def test_who_has_registered_before_serve_lists_it_is_given_up_for_itself() -> None:
    """What was taken back while it started stops as such, and no other besides."""
    late = "m/decode/late"

    async def play() -> None:
        s = Scene(config=PINNED)
        s.exchange()
        await s.step(1)
        s.roster.there[late] = made(late)
        for second in range(2, 60):
            await s.step(second)
        assert (s.log, s.exchange().stopping) == ([], set())
        s.running.append(late)
        s.exchange()
        await s.step(60)
        assert len(s.exchange().stopping) == 1
        assert s.exchange().counts["m", "decode"] == 2

    run(play())
