"""Faults on purpose: which ones can be, when they strike, and what they do; on twins of clock and process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_cluster.config.convert import build, plain
from ernie_cluster.config.faults import POINTS, FaultRule, FaultsConfig
from ernie_cluster.errors import ConfigError, EngineFailed, TransferFailed
from ernie_cluster.faults import FaultOrder, Faults, fits, strikes


class Recorded:
    """`Acts` that nobody survives for real."""

    def __init__(self) -> None:
        self.done: list[tuple[str, float]] = []

    def sleep(self, seconds: float) -> None:
        self.done.append(("sleep", seconds))

    async def pause(self, seconds: float) -> None:
        self.done.append(("pause", seconds))

    def kill(self) -> None:
        self.done.append(("kill", 0.0))

    def stop(self, seconds: float) -> None:
        self.done.append(("stop", seconds))


class Watch:
    """A clock that is set by hand."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def made(*rules: FaultRule, seed: int = 0, name: str = "ernie:m/decode/abc:1") -> tuple[Faults, Recorded, Watch]:
    acts, watch = Recorded(), Watch()
    return Faults("decode", name, FaultsConfig(True, seed, rules), clock=watch, acts=acts), acts, watch


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"point": "decode.stop", "action": "kill"}, "decode.step"),
        ({"point": "decode.step", "action": "corrupt"}, "delay, error, kill, stop"),
        ({"point": "decode.step", "action": "stop", "lasts_s": 0.0}, "lasts_s"),
        ({"point": "decode.step", "action": "stop", "lasts_s": 301.0}, "300"),
        ({"point": "decode.step", "action": "delay", "probability": 1.1}, "probability"),
        ({"point": "decode.step", "action": "delay", "after": -1}, "after"),
        ({"point": "decode.step", "action": "delay", "times": 0}, "times"),
        ({"point": "decode.step", "action": "delay", "replica": ""}, "replica"),
    ],
)
def test_what_cannot_strike_is_refused_with_what_can(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FaultRule(**fields)


def test_an_unknown_point_lists_all_that_are_known() -> None:
    with pytest.raises(ConfigError) as refused:
        FaultRule("nowhere", "kill")
    assert all(point in str(refused.value) for point in POINTS)


def test_points_without_enabled_are_a_mistake() -> None:
    with pytest.raises(ConfigError, match="enabled"):
        FaultsConfig(points=(FaultRule("decode.step", "kill"),))


def test_a_configuration_comes_back_as_it_was() -> None:
    tree = {
        "enabled": True,
        "seed": 3,
        "points": [{"point": "transport.push", "action": "corrupt", "role": "prefill", "lasts_s": "2s", "times": 4}],
    }
    config = build(FaultsConfig, tree)
    assert (config.points[0].lasts_s, build(FaultsConfig, plain(config))) == (2.0, config)


def test_nobody_pays_who_has_none() -> None:
    assert Faults.of(FaultsConfig(), "decode", "x") is None
    assert Faults.of(FaultsConfig(enabled=True), "decode", "x") is not None


@given(st.integers(0, 5), st.none() | st.integers(1, 5), st.integers(0, 30))
def test_a_sure_fault_strikes_after_so_many_and_so_often(after: int, times: int | None, passes: int) -> None:
    faults, _, _ = made(FaultRule("decode.step", "delay", after=after, times=times))
    struck = [faults.hit("decode.step") is not None for _ in range(passes)]
    due = max(0, passes - after)
    assert sum(struck) == (due if times is None else min(times, due))
    assert not any(struck[:after])


@given(st.floats(0, 1), st.floats(0, 1, exclude_max=True))
def test_chance_decides_alone_where_nothing_else_does(probability: float, chance: float) -> None:
    assert strikes(FaultRule("decode.step", "delay", probability=probability), 7, 7, chance) == (chance < probability)


def test_the_same_seed_strikes_the_same_and_processes_differ() -> None:
    rule = FaultRule("decode.step", "delay", probability=0.5)

    def course(seed: int, name: str) -> list[bool]:
        faults, _, _ = made(rule, seed=seed, name=name)
        return [faults.hit("decode.step") is not None for _ in range(64)]

    assert course(1, "a") == course(1, "a")
    assert len({tuple(course(*of)) for of in ((1, "a"), (2, "a"), (1, "b"))}) == 3


@pytest.mark.parametrize(
    ("role", "replica", "is_meant"),
    [("any", "*", True), ("decode", "abc", True), ("decode", "m/decode/a?c", True), ("prefill", "*", False), ("decode", "abd", False)],
)  # fmt: skip
def test_whom_a_fault_is_meant_for(role: Any, replica: str, is_meant: bool) -> None:
    rule = FaultRule("decode.step", "kill", role=role, replica=replica)
    assert fits(rule, "decode", "ernie:m/decode/abc:1") == is_meant


def test_other_points_do_not_count() -> None:
    faults, acts, _ = made(FaultRule("decode.step", "kill", after=1))
    faults.meet("prefill.step")
    faults.meet("decode.step")
    assert acts.done == []
    faults.meet("decode.step")
    assert acts.done == [("kill", 0.0)]


def test_what_strikes_is_done() -> None:
    for action, done in (("delay", "sleep"), ("stop", "stop")):
        faults, acts, _ = made(FaultRule("prefill.step", action, lasts_s=2.5))  # type: ignore[arg-type]
        faults.meet("prefill.step")
        assert acts.done == [(done, 2.5)]
    faults, _, _ = made(FaultRule("prefill.step", "error"))
    with pytest.raises(EngineFailed, match=r"prefill\.step"):
        faults.meet("prefill.step")
    faults, _, _ = made(FaultRule("transport.accept", "error"))
    with pytest.raises(TransferFailed):
        faults.meet("transport.accept")


def test_on_an_event_loop_nothing_blocks() -> None:
    faults, acts, _ = made(FaultRule("replica.poll", "delay", lasts_s=2.0))

    async def poll(number: int) -> int:
        return number + 1

    guarded = faults.guard("replica", {"poll": poll, "abort": poll})
    assert guarded["abort"] is poll
    assert asyncio.run(guarded["poll"](4)) == 5  # type: ignore[arg-type]
    assert acts.done == [("pause", 2.0)]


def test_what_is_dropped_there_is_as_if_nobody_had_been_asked() -> None:
    faults, _, _ = made(FaultRule("replica.poll", "drop"))

    async def asked() -> bool:
        task = asyncio.create_task(faults.meet_async("replica.poll"))
        await asyncio.wait([task])
        return task.cancelled()

    assert asyncio.run(asked())


def test_an_order_holds_for_its_time_and_what_is_configured_for_ever() -> None:
    configured, ordered = FaultRule("decode.step", "delay", after=99), FaultRule("decode.step", "stop", lasts_s=0.5)
    faults, acts, watch = made(configured)
    told = faults.obey(FaultOrder("add", ordered, 10.0))
    assert [(state.rule, state.left_s) for state in told] == [(configured, None), (ordered, 10.0)]
    faults.meet("decode.step")
    watch.now_s += 10.0
    faults.meet("decode.step")
    assert acts.done == [("stop", 0.5)]
    (first, second) = faults.obey(FaultOrder("list"))
    assert (first.num_hits, second.num_hits, second.num_struck, second.left_s) == (2, 1, 1, 0.0)
    assert [state.rule for state in faults.obey(FaultOrder("clear"))] == [configured]


def test_many_orders_push_out_the_oldest_and_nothing_that_is_configured() -> None:
    faults, _, _ = made(FaultRule("decode.step", "delay", after=7))
    for number in range(150):
        told = faults.obey(FaultOrder("add", FaultRule("decode.step", "delay", after=1000 + number), 10.0))
    assert [state.rule.after for state in told] == [7, *range(1050, 1150)]


def test_an_order_for_others_is_none_of_ours() -> None:
    faults, _, _ = made()
    assert faults.obey(FaultOrder("add", FaultRule("decode.step", "kill", role="prefill"), 10.0)) == []


_VICTIM = """
import sys, time
from ernie_cluster.config.faults import FaultRule, FaultsConfig
from ernie_cluster.faults import Faults
faults = Faults("decode", "x", FaultsConfig(True, 0, (FaultRule("decode.step", sys.argv[1], lasts_s=0.3),)))
print("before", flush=True)
start = time.monotonic()
faults.meet("decode.step")
print(time.monotonic() - start, flush=True)
"""


def test_a_real_process_is_stopped_and_goes_on() -> None:
    victim = subprocess.run([sys.executable, "-c", _VICTIM, "stop"], capture_output=True, text=True, timeout=30)
    assert victim.returncode == 0, victim.stderr
    assert float(victim.stdout.split()[1]) >= 0.29


def test_a_real_process_is_killed() -> None:
    victim = subprocess.run([sys.executable, "-c", _VICTIM, "kill"], capture_output=True, text=True, timeout=30)
    assert (victim.returncode, victim.stdout) == (-signal.SIGKILL, "before\n")


def test_who_has_stopped_is_seen_stopped() -> None:
    code = _VICTIM.replace("lasts_s=0.3", "lasts_s=20.0")
    with subprocess.Popen([sys.executable, "-c", code, "stop"], stdout=subprocess.PIPE, text=True) as victim:
        assert victim.stdout is not None
        victim.stdout.readline()
        pid, status = os.waitpid(victim.pid, os.WUNTRACED)
        assert (pid, os.WIFSTOPPED(status)) == (victim.pid, True)
        victim.kill()
        deadline = time.monotonic() + 10
        while os.waitpid(victim.pid, os.WNOHANG)[0] == 0:
            assert time.monotonic() < deadline
        victim.returncode = -9
