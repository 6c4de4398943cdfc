"""Requests that come by chance, from a seed: Poisson arrivals whose rate and lengths change from phase to phase."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ernie_cluster.policy.replay.machine import Job


@dataclass(frozen=True, slots=True)
class LoadPhase:
    """For `seconds`, one model gets `requests_per_s`, of these lengths on average."""

    seconds: float
    requests_per_s: float
    prompt_tokens: float
    output_tokens: float
    media_share: float = 0.0
    """Of the requests that bring a picture."""
    media_tokens: int = 0
    """Of each of them, on top of the prompt."""
    model: str = "m"


def jobs_of(phases: Sequence[LoadPhase], seed: int) -> Iterator[Job]:
    """Requests in the order of their arrival; phases of one model follow each other.

    Lengths scatter evenly over half to one and a half times the mean.
    """
    chance = random.Random(seed)
    number, start_s = 0, 0.0
    for phase in phases:
        end_s = start_s + phase.seconds
        now_s = start_s
        while phase.requests_per_s > 0:
            now_s += chance.expovariate(phase.requests_per_s)
            if now_s >= end_s:
                break
            media = phase.media_tokens if chance.random() < phase.media_share else 0
            prompt = round(phase.prompt_tokens * chance.uniform(0.5, 1.5))
            output = round(phase.output_tokens * chance.uniform(0.5, 1.5))
            yield Job(number, phase.model, now_s, max(1, prompt) + media, max(1, output), media)
            number += 1
        start_s = end_s


def merged(*streams: Sequence[Job]) -> list[Job]:
    """Several models' requests as one stream, numbered anew."""
    jobs = sorted((j for s in streams for j in s), key=lambda j: (j.arrived_s, j.model))
    for number, job in enumerate(jobs):
        job.number = number
    return jobs
