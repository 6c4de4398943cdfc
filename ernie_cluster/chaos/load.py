"""A steady load: so many clients, each asks, reads to the end, and asks again."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ernie_cluster.chaos.prompts import Prompt
from ernie_cluster.chaos.stream import Answer, Outcome

_SALTED = 0.5
"""Share of requests that find nothing in prefix caches."""

Ask = Callable[[Prompt], Coroutine[Any, Any, Outcome]]


class SteadyLoad:
    """Owns the clients of a load.

    Args:
        ask: asks one prompt, and never raises.
        prompts: asked in an order of chance, each client in its own.
        num_clients: requests at the same time.
        seed: of that order.
    """

    def __init__(self, ask: Ask, prompts: Sequence[Prompt], num_clients: int, seed: int) -> None:
        self._ask, self._prompts, self._num_clients, self._seed = ask, prompts, num_clients, seed
        self.outcomes: list[Outcome] = []
        """Of requests that have ended."""
        self.num_running = 0
        self._own = secrets.token_hex(8)
        """Of salts: an earlier load with the same seed has filled caches under its own."""
        self._tasks: list[asyncio.Task[None]] = []
        self._is_ending = False

    def start(self) -> None:
        self._is_ending = False
        self._tasks = [asyncio.create_task(self._client(i)) for i in range(self._num_clients)]

    async def stop(self) -> None:
        """No further requests; those that run end first."""
        self._is_ending = True
        await asyncio.gather(*self._tasks)

    async def _client(self, number: int) -> None:
        chance = random.Random(f"{self._seed}:{number}:{len(self.outcomes)}")
        while not self._is_ending:
            for prompt in chance.sample(self._prompts, len(self._prompts)):
                if self._is_ending:
                    return
                self.num_running += 1
                try:
                    asked = prompt.salted(f"{self._own}{chance.random()}") if chance.random() < _SALTED else prompt
                    self.outcomes.append(await self._ask(asked))
                finally:
                    self.num_running -= 1


@dataclass(frozen=True, slots=True)
class References:
    """What a calm system answers."""

    answers: Mapping[str, Answer]
    """By prompt."""
    unsteady: tuple[str, ...]
    """Prompts with several answers although nothing happened: they cannot tell right from wrong."""

    def is_wrong(self, outcome: Outcome) -> bool:
        """Whether a whole answer is another one than in calm."""
        expected = self.answers.get(outcome.prompt)
        return outcome.answer is not None and expected is not None and outcome.answer != expected


def references(outcomes: Iterable[Outcome]) -> References:
    """Of a calm run."""
    found: defaultdict[str, set[Answer]] = defaultdict(set)
    for outcome in outcomes:
        if outcome.answer is not None:
            found[outcome.prompt].add(outcome.answer)
    return References(
        {name: next(iter(answers)) for name, answers in found.items() if len(answers) == 1},
        tuple(sorted(name for name, answers in found.items() if len(answers) > 1)),
    )
