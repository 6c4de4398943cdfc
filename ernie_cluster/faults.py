"""Fail points: places in our own processes where a configured fault strikes. For tests and staging; see `config.faults`.

Deciding is apart from doing: `strikes` is pure, `Faults` counts and draws, `Acts` does. Where no faults are configured
there is no `Faults` at all, and a point costs one look at None.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, Protocol

from ernie_cluster.config.faults import POINTS, FaultRole, FaultRule, FaultsConfig
from ernie_cluster.errors import EngineFailed, ErnieClusterError, TransferFailed

_HELPER_WAIT_S = 5.0
_NUM_KEPT = 100
"""Faults by order at the same time, those that are over included."""


@dataclass(frozen=True, slots=True)
class FaultOrder:
    """What an operator wants of the faults of a running application."""

    kind: Literal["add", "clear", "list"]
    rule: FaultRule | None = None
    """To be added."""
    for_s: float = 0.0
    """How long it holds."""


@dataclass(frozen=True, slots=True)
class FaultState:
    """A fault in one process."""

    process: str
    rule: FaultRule
    left_s: float | None
    """Until it is over; None = it was configured, and stays."""
    num_hits: int
    """How often its point was passed."""
    num_struck: int


def strikes(rule: FaultRule, num_hits: int, num_struck: int, chance: float) -> bool:
    """Whether a fault befalls somebody who comes to its point.

    Args:
        num_hits: how many came before.
        num_struck: how many of them it befell.
        chance: a number of [0, 1).
    """
    if num_hits < rule.after or (rule.times is not None and num_struck >= rule.times):
        return False
    return chance < rule.probability


def fits(rule: FaultRule, role: FaultRole, name: str) -> bool:
    """Whether a fault is meant for a process of this role and name."""
    return rule.role in ("any", role) and fnmatchcase(name, f"*{rule.replica}*")


class Acts(Protocol):
    """Does what faults do to a process."""

    def sleep(self, seconds: float) -> None: ...

    async def pause(self, seconds: float) -> None: ...

    def kill(self) -> None: ...

    def stop(self, seconds: float) -> None: ...


class ProcessActs:
    """On the process that it is called in."""

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    async def pause(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def stop(self, seconds: float) -> None:
        """All threads stand still; a helper that was started before lets them go on."""
        pid = os.getpid()
        quiet: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        wake = ["/bin/sh", "-c", f"sleep {seconds:.3f}; kill -CONT {pid}"]
        with subprocess.Popen(wake, start_new_session=True, **quiet) as helper:
            os.kill(pid, signal.SIGSTOP)
            with contextlib.suppress(subprocess.TimeoutExpired):
                helper.wait(_HELPER_WAIT_S)


@dataclass(slots=True, eq=False)
class _Live:
    rule: FaultRule
    until_s: float | None
    num_hits: int = 0
    num_struck: int = 0


class Faults:
    """The faults of one process; safe to use from any thread and any event loop.

    Args:
        role, name: of this process.
        config: its faults from the start.
        clock: seconds, not running backwards.
        acts: does what faults do.
    """

    def __init__(
        self,
        role: FaultRole,
        name: str,
        config: FaultsConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        acts: Acts | None = None,
    ) -> None:
        self._role, self._name, self._clock, self._acts = role, name, clock, acts or ProcessActs()
        self._random = random.Random(f"{config.seed}:{name}")
        self._lock = threading.Lock()
        self._live = [_Live(rule, None) for rule in config.points if fits(rule, role, name)]

    @classmethod
    def of(cls, config: FaultsConfig, role: FaultRole, name: str) -> Faults | None:
        """Those of a process; None where there are to be none."""
        return cls(role, name, config) if config.enabled else None

    def obey(self, order: FaultOrder) -> list[FaultState]:
        """Carry an order out, where it fits; the faults that this process has had by order, and those that it has."""
        with self._lock:
            now = self._clock()
            if order.kind == "clear":
                self._live = [f for f in self._live if f.until_s is None]
            elif order.rule is not None and fits(order.rule, self._role, self._name):
                self._live.append(_Live(order.rule, now + order.for_s))
                ordered = [f for f in self._live if f.until_s is not None]
                self._live = [f for f in self._live if f.until_s is None] + ordered[-_NUM_KEPT:]
            return [
                FaultState(
                    self._name,
                    f.rule,
                    None if f.until_s is None else max(0.0, f.until_s - now),
                    f.num_hits,
                    f.num_struck,
                )
                for f in self._live
            ]

    def hit(self, point: str) -> FaultRule | None:
        """Somebody comes to a point: the fault that befalls him, or None."""
        assert point in POINTS, point
        found: FaultRule | None = None
        with self._lock:
            for fault in self._live:
                if fault.rule.point != point or (fault.until_s is not None and self._clock() >= fault.until_s):
                    continue
                if found is None and strikes(fault.rule, fault.num_hits, fault.num_struck, self._random.random()):
                    fault.num_struck += 1
                    found = fault.rule
                fault.num_hits += 1
        return found

    def meet(self, point: str) -> FaultRule | None:
        """`hit`, and what it brings, on a thread that may wait; drop and corrupt are left to the caller.

        Raises:
            TransferFailed, EngineFailed: the fault is an error.
        """
        rule = self.hit(point)
        if rule is not None:
            self.suffer(rule)
        return rule

    def suffer(self, rule: FaultRule) -> None:
        """What a fault brings, as of `meet`."""
        match rule.action:
            case "delay":
                self._acts.sleep(rule.lasts_s)
            case _:
                self._at_once(rule)

    async def meet_async(self, point: str) -> None:
        """`meet` on an event loop, which goes on. What is dropped there is as if its task were cancelled."""
        rule = self.hit(point)
        if rule is None:
            return
        match rule.action:
            case "delay":
                await self._acts.pause(rule.lasts_s)
            case "drop":
                raise asyncio.CancelledError(f"injected fault at {point}")
            case _:
                self._at_once(rule)

    def guard(
        self, where: str, methods: Mapping[str, Callable[..., Awaitable[Any]]]
    ) -> dict[str, Callable[..., Awaitable[Any]]]:
        """The same methods; those with a point `<where>.<name>` pass it first."""

        def guarded(point: str, method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
            async def call(*args: Any) -> Any:
                await self.meet_async(point)
                return await method(*args)

            return call

        return {
            name: guarded(f"{where}.{name}", method) if f"{where}.{name}" in POINTS else method
            for name, method in methods.items()
        }

    def _at_once(self, rule: FaultRule) -> None:
        match rule.action:
            case "error":
                raise injected(rule)
            case "kill":
                self._acts.kill()
            case "stop":
                self._acts.stop(rule.lasts_s)


def injected(rule: FaultRule) -> ErnieClusterError:
    """The error that a fault is."""
    words = f"injected fault at {rule.point}"
    return TransferFailed(words) if rule.point.startswith("transport.") else EngineFailed(words)
