"""What users over HTTP and over gRPC have in common: whose turn it is to ask what."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

from locust import User, task
from locust.env import Environment

import loadtests.options  # noqa: F401  # adds the options
from ernie_cluster.bench.options import source_of
from ernie_cluster.bench.record import Record
from loadtests.board import BOARD

_RANGE = 1 << 32
"""Requests of one process have numbers of their own, so that workers do not ask the same."""


@cache
def _numbers() -> Iterator[int]:
    return itertools.count(random.SystemRandom().randrange(1 << 16) * _RANGE)


class Asker(User):
    """A user that asks, reads to the end, thinks a while, and asks again."""

    abstract = True

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.options = environment.parsed_options

    def ask(self, scenario: str, body: dict[str, Any]) -> Record:
        """Send one request and read its answer; never raises for what the server does."""
        raise NotImplementedError

    @property
    def model(self) -> str:
        """The one that is asked."""
        raise NotImplementedError

    def wait_time(self) -> float:
        return random.expovariate(1 / self.options.think_time) if self.options.think_time else 0.0

    @task
    def chat(self) -> None:
        options, number = self.options, next(_numbers())
        scenario = source_of(options).choose(options.seed, number)
        body = scenario.body(self.model, options.seed, number, is_plain=options.plain)
        record = self.ask(scenario.name, body)
        BOARD.add(self.environment, record)
        if record.error and record.latency_s < 0.1:
            time.sleep(0.1)  # refusals come quickly: their senders must not become a storm
