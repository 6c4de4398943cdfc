"""How near the foretold time to the first token comes to the measured one, on a server that has little to do.

    python scripts/bench/predict.py CONFIG.yaml [--port 18701] [--count 60] [--seed 0]

Starts the server and asks one request after the other, then two at a time: prompts of 50 to 3,500 tokens, every third with
a picture, every fourth one that was asked before. Foretold: `expected_ttft_s` of the timeline's span "route"; measured: its
span "first_token", from the router's answer to the first token at the API replica. Warm-up requests are not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from overload import WORDS, percentile, picture
from overloaded.client import Client, request_bytes
from own_server import serving

LENGTHS = (40, 150, 500, 1500, 2800)
"""Words of a prompt, about as many tokens."""
WARM = 30


@dataclass(frozen=True)
class Case:
    """One request."""

    raw: bytes
    num_words: int
    has_picture: bool
    is_known: bool


@dataclass(frozen=True)
class Seen:
    """Its times to the first token, in seconds."""

    case: Case
    foretold_s: float
    measured_s: float
    client_s: float

    @property
    def error(self) -> float:
        """As a share of what was measured; above 0 = it came sooner than was foretold."""
        return self.foretold_s / self.measured_s - 1


def make(chance: random.Random, number: int, model: str) -> Case:
    num_words, has_picture = chance.choice(LENGTHS), number % 3 == 1
    text = f"{number}: " + " ".join(chance.choices(WORDS, k=num_words))
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if has_picture:
        content.insert(0, {"type": "image_url", "image_url": {"url": picture(chance)}})
    body = {
        "model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 4, "ignore_eos": True,
        "temperature": 0, "stream": True, "include_timeline": True,
    }  # fmt: skip
    return Case(request_bytes(body), num_words, has_picture, False)


async def ask(client: Client, case: Case) -> Seen:
    """Raises RuntimeError for any answer but one to the end."""
    answer = await client.send(case.raw)
    if answer.status != 200:
        raise RuntimeError(f"HTTP {answer.status}: {answer.body[:300]!r}")
    events = [json.loads(line[6:]) for line in answer.body.split(b"\n") if line.startswith(b"data: {")]
    timeline = {span["name"]: span for event in events for span in event.get("timeline") or ()}
    foretold_s = float(timeline["route"]["expected_ttft_s"])
    return Seen(case, foretold_s, timeline["first_token"]["duration_s"], answer.first_s)


async def ask_all(client: Client, cases: list[Case], at_once: int) -> list[Seen]:
    """So many at a time, with a little rest after each."""
    seen: list[Seen] = []

    async def some() -> None:
        while cases:
            seen.append(await ask(client, cases.pop(0)))
            await asyncio.sleep(0.05)

    await asyncio.gather(*(some() for _ in range(at_once)))
    return seen


async def measure(url: str, args: argparse.Namespace) -> None:
    chance, client, numbers = random.Random(args.seed), Client(url), count()
    fresh = [make(chance, next(numbers), args.model) for _ in range(WARM + 2 * args.count)]
    for case in fresh[:WARM]:
        await ask(client, case)
    for at_once in (1, 2):
        cases = fresh[WARM + (at_once - 1) * args.count :][: args.count]
        known = [Case(c.raw, c.num_words, c.has_picture, True) for c in cases[::3]]
        seen = await ask_all(client, [*cases, *known], at_once)
        print(f"\n{at_once} at a time\n{table(seen)}", flush=True)
    await client.close()


def table(seen: Sequence[Seen]) -> str:
    """By kind of request."""
    groups: list[tuple[str, Callable[[Seen], bool]]] = [
        ("all", lambda s: True),
        ("text, up to 150 words", lambda s: not s.case.has_picture and not s.case.is_known and s.case.num_words <= 150),
        ("text, more", lambda s: not s.case.has_picture and not s.case.is_known and s.case.num_words > 150),
        ("with a picture", lambda s: s.case.has_picture and not s.case.is_known),
        ("known", lambda s: s.case.is_known),
    ]
    lines = [
        "| | requests | measured, median | error: median, p90 | median with its sign | within 30 % |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, belongs in groups:
        own = [s for s in seen if belongs(s)]
        signed = statistics.median(s.error for s in own)
        errors = [abs(s.error) for s in own]
        within = sum(e <= 0.3 for e in errors) / len(own)
        measured = statistics.median(s.measured_s for s in own)
        spread = f"{statistics.median(errors):.0%}, {percentile(errors, 0.9):.0%}"
        lines.append(f"| {name} | {len(own)} | {measured * 1e3:.1f} ms | {spread} | {signed:+.0%} | {within:.0%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--model", default="ernie-pocket")
    parser.add_argument("--port", type=int, default=18701)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with serving(args.config, args.port, Path(f"{args.config.stem}.log")) as server:
        asyncio.run(measure(server.url, args))


if __name__ == "__main__":
    main()
