"""The steady load of an experiment."""

from __future__ import annotations

import asyncio

from ernie_cluster.chaos.load import SteadyLoad
from ernie_cluster.chaos.prompts import Prompt, make_prompts
from ernie_cluster.chaos.stream import Outcome


def salts_of(seed: int, num_asked: int) -> set[str]:
    """Of a load that asks so much."""
    asked: list[Prompt] = []

    async def run() -> None:
        enough = asyncio.Event()

        async def ask(prompt: Prompt) -> Outcome:
            asked.append(prompt)
            if len(asked) >= num_asked:
                enough.set()
            await asyncio.sleep(0)
            return Outcome(prompt.name, 0.0)

        load = SteadyLoad(ask, make_prompts("m", 0, has_eyes=True, max_tokens=8), 2, seed)
        load.start()
        await enough.wait()
        await load.stop()

    asyncio.run(run())
    return {prompt.body["cache_salt"] for prompt in asked if "cache_salt" in prompt.body}


def test_nothing_of_an_earlier_load_is_in_a_cache() -> None:
    first, second = salts_of(0, 40), salts_of(0, 40)
    assert first
    assert second
    assert not first & second
