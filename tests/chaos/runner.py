"""Runs an experiment against an application of the tests."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

import httpx

from ernie_cluster.chaos.blows import Blow
from ernie_cluster.chaos.experiment import Experiment, Plan
from ernie_cluster.chaos.prompts import Prompt, make_prompts
from ernie_cluster.chaos.report import Report
from ernie_cluster.chaos.stream import Outcome, ask
from ernie_cluster.cli.operate import Cluster
from tests.e2e.application import Application

HUNG_S = 120.0


def experiment(
    app: Application,
    volleys: Iterable[Sequence[Blow]],
    *,
    calm_s: float = 1.0,
    model: str = "tiny",
    num_clients: int = 3,
    max_tokens: int = 32,
    may_break: bool = False,
    seed: int = 0,
) -> Report:
    """All of the volleys, however long it takes to get whole in between."""
    plan = Plan(model, seed, num_clients, calm_s, faults_s=float("inf"), after_s=1.0, may_break=may_break)
    prompts = make_prompts(model, seed, has_eyes=True, max_tokens=max_tokens)

    async def run() -> Report:
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None)) as client:

            async def once(prompt: Prompt) -> Outcome:
                return await ask(client, app.url, prompt, HUNG_S)

            return await Experiment(Cluster(app.url, {}), once, prompts, volleys, plan, print).run()

    return asyncio.run(run())
