"""The router's side of faults that operators set while the application runs: every process is told, and asked."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import ray

from ernie_cluster.actors.messages import NAMESPACE, ReplicaInfo
from ernie_cluster.api.operator import FaultsView, FaultView
from ernie_cluster.faults import FaultOrder, Faults, FaultState

_ANSWER_S = 2.0
"""A process that stands still on purpose does not answer."""


async def obey(order: FaultOrder, own: Faults | None, infos: Mapping[str, ReplicaInfo]) -> FaultsView:
    """Carry an order out in all replicas, and in the router last, which may not live to tell.

    Args:
        own: the router's.
        infos: of the replicas, by id.
    """
    asked = {asyncio.ensure_future(_ask(info, order)): key for key, info in infos.items()}
    done, waiting = await asyncio.wait(asked, timeout=_ANSWER_S) if asked else (set(), set())
    for late in waiting:
        late.cancel()
    silent = [asked[task] for task in asked if task in waiting or task.exception() is not None]
    states = [state for task in done if task.exception() is None for state in task.result()]
    states += [] if own is None else own.obey(order)
    return FaultsView(tuple(map(view_of, states)), tuple(silent))


def view_of(state: FaultState) -> FaultView:
    """As operators see it."""
    return FaultView(state.process, state.rule, state.left_s, state.num_hits, state.num_struck)


async def _ask(info: ReplicaInfo, order: FaultOrder) -> list[FaultState]:
    actor: Any = ray.get_actor(info.actor_name, NAMESPACE)
    states: list[FaultState] = await actor.faults.remote(order)
    return states
