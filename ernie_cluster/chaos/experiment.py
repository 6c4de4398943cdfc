"""A bounded experiment: calm, then one fault after another under load, then calm again.

It knows a running system by its API and its operator's view alone, so it can run from anywhere.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from ernie_cluster.api.operator import ClusterView
from ernie_cluster.chaos.blows import Blow, Operator, Scene
from ernie_cluster.chaos.load import Ask, SteadyLoad, references
from ernie_cluster.chaos.prompts import Prompt
from ernie_cluster.chaos.report import Figures, Report, Struck, calm_medians, figures
from ernie_cluster.chaos.rest import Held, held
from ernie_cluster.chaos.stream import Outcome
from ernie_cluster.errors import ErnieClusterError
from ernie_cluster.faults import FaultOrder

_LOOK_S = 0.2
_ASKED_S = 300.0
_RECOVER_S = 90.0
_SETTLE_S = 10.0
"""Everything that was lent has to be back so long after the load."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how hard."""

    model: str
    """Served name."""
    seed: int
    num_clients: int
    calm_s: float
    """Of load before the first fault."""
    faults_s: float
    """No fault begins later than this after the first."""
    after_s: float
    """Of load after the last."""
    may_break: bool
    """Whether connections may break, because API processes are among the victims."""


class Experiment:
    """Runs once.

    Args:
        operator: of the system; it must take faults.
        ask: asks one prompt of it.
        prompts: of the load.
        volleys: the faults, in order; those of a volley strike at once.
        plan: how long and how hard.
        say: told what goes on.
    """

    def __init__(
        self,
        operator: Operator,
        ask: Ask,
        prompts: Sequence[Prompt],
        volleys: Iterable[Sequence[Blow]],
        plan: Plan,
        say: Callable[[str], None],
    ) -> None:
        self._operator, self._volleys, self._plan, self._say = operator, volleys, plan, say
        self._prompts = prompts
        self._load = SteadyLoad(ask, prompts, plan.num_clients, plan.seed)
        self._chance = random.Random(plan.seed)

    async def run(self) -> Report:
        """From calm to calm.

        Raises:
            ErnieClusterError: the system takes no faults, or cannot be reached at the start.
        """
        plan, load = self._plan, self._load
        await asyncio.to_thread(self._operator.faults, FaultOrder("clear"))
        calm = held(await asyncio.to_thread(self._operator.view), plan.model)
        asked = f"{plan.num_clients} clients ask {len(self._prompts)} prompts for {plan.calm_s:g} s, each once at least"
        self._say(f"calm: {asked}")
        load.start()
        await asyncio.sleep(plan.calm_s)
        await self._all_asked()
        num_calm = len(load.outcomes)
        strikes = await self._strike_all(calm)
        await self._clear()
        num_faulty = len(load.outcomes)
        self._say(f"calm again: {plan.after_s:g} s")
        await asyncio.sleep(plan.after_s)
        await load.stop()
        leaks, settled_s = await self._settle(calm)
        calm_ones = load.outcomes[:num_calm]
        expected, medians = references(calm_ones), calm_medians(calm_ones)

        def of(outcomes: Sequence[Outcome]) -> Figures:
            return figures(outcomes, expected, medians, may_break=plan.may_break)

        return Report(
            plan.model,
            plan.seed,
            of(calm_ones),
            of(load.outcomes[num_calm:num_faulty]),
            of(load.outcomes[num_faulty:]),
            tuple(strikes),
            leaks,
            settled_s,
            expected.unsteady,
        )

    async def _all_asked(self) -> None:
        """Until each prompt has an answer to compare with; those that never get one are in the report."""
        end_s = time.monotonic() + _ASKED_S
        wanted = {prompt.name for prompt in self._prompts}
        while time.monotonic() < end_s and not wanted <= {o.prompt for o in self._load.outcomes}:  # noqa: ASYNC110  clients work
            await asyncio.sleep(_LOOK_S)

    async def _strike_all(self, calm: Held) -> list[Struck]:
        end_s = time.monotonic() + self._plan.faults_s
        struck: list[Struck] = []
        for volley in self._volleys:
            if time.monotonic() >= end_s:
                break
            found = await self._strike(volley, calm)
            if found is None:
                await asyncio.sleep(_LOOK_S)
                continue
            struck.append(found)
            self._say(f"{found.name}: {_words(found)}")
        return struck

    async def _strike(self, volley: Sequence[Blow], calm: Held) -> Struck | None:
        """One volley, and what comes of it; None when there is nobody to strike."""
        view = await self._look()
        if view is None:
            return None
        await self._clear()  # what is told of a fault is told of this one
        scene = Scene(self._operator, self._plan.model, view, self._chance, self._say)
        hits = [hit for hit in await asyncio.gather(*(blow.strike(scene) for blow in volley)) if hit is not None]
        if len(hits) < len(volley):
            return None
        name, victims = " and ".join(blow.name for blow in volley), ", ".join(hit.victim for hit in hits)
        if not all(hit.did_strike for hit in hits):
            return Struck(name, victims, False, None)
        dead = {hit.victim for hit in hits if hit.is_dead}
        return Struck(name, victims, True, await self._recovery_s(dead, calm))

    async def _recovery_s(self, dead: Collection[str], calm: Held) -> float | None:
        """Until as many replicas as in calm are ready, and somebody who asked after the strike has a whole answer."""
        struck_s = time.monotonic()
        while time.monotonic() < struck_s + _RECOVER_S:
            view = await self._look()
            if view is not None:
                is_gone = all(r.replica not in dead for r in view.replicas)
                is_whole = not Held(held(view, self._plan.model).replicas, {}).objection(calm)
                is_served = any(o.began_s > struck_s and o.kind == "whole" for o in self._load.outcomes)
                if is_gone and is_whole and is_served:
                    return time.monotonic() - struck_s
            await asyncio.sleep(_LOOK_S)
        return None

    async def _settle(self, calm: Held) -> tuple[str, float]:
        """What is not back in time, "" if all is; and how long it took."""
        ended_s = time.monotonic()
        while True:
            view = await self._look()
            objection = "nobody can tell" if view is None else held(view, self._plan.model).objection(calm)
            took_s = time.monotonic() - ended_s
            if not objection or took_s > _SETTLE_S:
                return objection, took_s
            await asyncio.sleep(_LOOK_S)

    async def _look(self) -> ClusterView | None:
        """None while nobody can tell."""
        try:
            return await asyncio.to_thread(self._operator.view)
        except ErnieClusterError:
            return None

    async def _clear(self) -> None:
        try:
            await asyncio.to_thread(self._operator.faults, FaultOrder("clear"))
        except ErnieClusterError as e:
            self._say(f"faults could not be ended, they end by themselves: {e}")


def _words(struck: Struck) -> str:
    if not struck.did_strike:
        return "nothing came by in time"
    return "NOT RECOVERED" if struck.recovered_s is None else f"whole again after {struck.recovered_s:.1f} s"
