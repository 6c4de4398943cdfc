"""What a server does with five times of what it can do: who is refused, how fast, and whether the others are served in time.

    python scripts/bench/overload.py CONFIG.yaml [--port 18700] [--times 5] [--seconds 60] [--seed 0]

Starts the server, finds its capacity with clients that wait for each answer, then sends `times` as much whether it answers
or not (Poisson arrivals). Texts of different lengths, every seventh with a picture; every tenth is batch work (priority 1);
each request says when it must be finished. A refused client does not come back, but for one in twenty, who does what
Retry-After says. With --url a server that runs already is asked, and nothing is said of its memory.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from overloaded.client import Answer, Client, request_bytes
from own_server import Server, serving
from PIL import Image

DEADLINES_S = (8.0, 15.0, 30.0)
WORDS = [
    "red",
    "circle",
    "left",
    "of",
    "a",
    "blue",
    "square",
    "what",
    "is",
    "above",
    "it",
    "how",
    "many",
    "are",
    "there",
    "and",
    "where",
    "does",
    "the",
    "line",
    "end",
]
MAX_TOKENS = (16, 32, 64, 128)
LAG_PROBE_S = 0.01


@dataclass(frozen=True)
class Asked:
    """One request, ready to be sent."""

    raw: bytes
    deadline_s: float
    is_batch: bool
    has_picture: bool


@dataclass(frozen=True)
class Seen:
    """What became of it."""

    asked: Asked
    status: int
    """0 = the connection broke."""
    took_s: float
    retry_after_s: float | None = None

    @property
    def is_in_time(self) -> bool:
        return self.status == 200 and self.took_s <= self.asked.deadline_s


def picture(chance: random.Random) -> str:
    """Another one each time, as a data URL."""
    image = Image.new("RGB", (chance.randrange(112, 336), chance.randrange(112, 336)), tuple(chance.randbytes(3)))
    out = io.BytesIO()
    image.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def make(chance: random.Random, number: int, model: str, *, stream: bool = False) -> Asked:
    """One request of the mix."""
    text = " ".join(chance.choices(WORDS, k=chance.choice((10, 40, 160))))
    has_picture, is_batch = number % 7 == 3, number % 10 == 9
    content: list[dict[str, object]] = [{"type": "text", "text": f"{number}: {text}"}]
    if has_picture:
        content.insert(0, {"type": "image_url", "image_url": {"url": picture(chance)}})
    deadline_s = chance.choice(DEADLINES_S)
    body = {
        "model": model, "messages": [{"role": "user", "content": content}], "max_tokens": chance.choice(MAX_TOKENS),
        "ignore_eos": True, "temperature": 0, "priority": int(is_batch), "stream": stream,
    }  # fmt: skip
    return Asked(request_bytes(body, x_request_timeout=f"{deadline_s:g}"), deadline_s, is_batch, has_picture)


async def ask(client: Client, asked: Asked) -> Seen:
    start = time.perf_counter()
    try:
        answer: Answer = await client.send(asked.raw)
    except (OSError, EOFError):
        return Seen(asked, 0, time.perf_counter() - start)
    after = answer.headers.get("retry-after")
    return Seen(asked, answer.status, time.perf_counter() - start, None if after is None else float(after))


async def capacity(client: Client, mix: Sequence[Asked], num_clients: int, seconds: float) -> float:
    """Answers per second when so many clients wait for each."""
    numbers = itertools.count()
    end_s = time.monotonic() + seconds
    done = 0

    async def one() -> None:
        nonlocal done
        while time.monotonic() < end_s:
            seen = await ask(client, mix[next(numbers) % len(mix)])
            done += seen.status == 200 and time.monotonic() < end_s

    await asyncio.gather(*(one() for _ in range(num_clients)))
    return done / seconds


class Watch:
    """Every second the memory of the server's processes; every hundredth how late this loop is."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.rss: list[dict[str, int]] = []
        self.lags_s: list[float] = []

    async def weigh(self) -> None:
        while True:
            self.rss.append(await asyncio.to_thread(self._server.rss_bytes))
            await asyncio.sleep(1)

    async def probe(self) -> None:
        while True:
            start = time.perf_counter()
            await asyncio.sleep(LAG_PROBE_S)
            self.lags_s.append(time.perf_counter() - start - LAG_PROBE_S)


@dataclass
class Flood:
    """What an overload brought."""

    rate: float
    seen: list[Seen]
    again: list[Seen]
    """Second tries of those who were told when to come back."""
    watch: Watch


async def flood(server: Server, client: Client, mix: Sequence[Asked], rate: float, seconds: float, seed: int) -> Flood:
    """Send at this rate for so long, and wait for all answers."""
    chance, watch = random.Random(seed), Watch(server)
    seen: list[Seen] = []
    again: list[Seen] = []

    async def one(number: int) -> None:
        asked = mix[number % len(mix)]
        first = await ask(client, asked)
        seen.append(first)
        if first.retry_after_s is not None and number % 20 == 0:
            await asyncio.sleep(first.retry_after_s)
            again.append(await ask(client, asked))

    watchers = [asyncio.create_task(watch.weigh()), asyncio.create_task(watch.probe())]
    tasks = []
    start = time.monotonic()
    due = start
    for number in itertools.count():
        due += chance.expovariate(rate)
        if due > start + seconds:
            break
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        tasks.append(asyncio.create_task(one(number)))
    await asyncio.gather(*tasks)
    for watcher in watchers:
        watcher.cancel()
    return Flood(rate, seen, again, watch)


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def weight(of: Sequence[dict[str, int]]) -> dict[str, float]:
    """Mean bytes of each process."""
    return {name: statistics.mean(seen.get(name, 0) for seen in of) for name in (of[-1] if of else {})}


def report(found: Flood, at_capacity: float) -> str:
    """The table for BENCHMARKS.md."""
    seen, watch = found.seen, found.watch
    refused = [s for s in seen if s.status in (429, 503)]
    at_once = [s for s in refused if not s.asked.is_batch]
    pictures = [s for s in at_once if s.asked.has_picture]
    admitted = [s for s in seen if s not in refused]
    in_time = sum(s.is_in_time for s in admitted)
    urgent = [s for s in admitted if not s.asked.is_batch]
    told = sum(s.retry_after_s is not None for s in refused)
    thirds = [weight(watch.rss[len(watch.rss) * i // 3 : len(watch.rss) * (i + 1) // 3]) for i in (1, 2)]
    grown = sorted(
        ((thirds[1][name] - size, name) for name, size in thirds[0].items() if name in thirds[1]), reverse=True
    )
    statuses = ", ".join(f"{status}: {count}" for status, count in sorted(Counter(s.status for s in seen).items()))

    def times(of: Sequence[Seen]) -> str:
        return ", ".join(f"{percentile([s.took_s for s in of], share) * 1e3:.1f}" for share in (0.5, 0.9, 0.99))

    rows = [
        ("capacity, offered", "", f"{at_capacity:.1f}/s, {found.rate:.1f}/s"),
        ("answers by status", "no 500", statuses),
        ("refused at once (not batch): p50, p90, p99 in ms", "p99 < 50", f"{times(at_once)} ({len(at_once)})"),
        ("of these with pictures", "", f"{times(pictures)} ({len(pictures)})"),
        ("refused with Retry-After", "all", f"{told} of {len(refused)}"),
        ("admitted that met their deadline", ">= 95 %", f"{in_time / max(1, len(admitted)):.1%} ({len(admitted)})"),
        ("of these without batch work", "", f"{sum(s.is_in_time for s in urgent) / max(1, len(urgent)):.1%} ({len(urgent)})"),
        ("answered in time, per second", "", f"{in_time / max(1e-9, len(seen) / found.rate):.1f}"),
        ("came back after Retry-After and were admitted", "mostly", f"{sum(s.status == 200 for s in found.again)} of {len(found.again)}"),
        ("memory, second and last third", "flat", ", ".join(f"{sum(t.values()) / 2**20:,.0f} MiB" for t in thirds)),
        ("of these grew the most", "", ", ".join(f"{name} by {more / 2**20:.1f}" for more, name in grown[:4])),
        ("lag of the client: p50, p99 in ms", "", f"{percentile(watch.lags_s, 0.5) * 1e3:.1f}, {percentile(watch.lags_s, 0.99) * 1e3:.1f}"),
    ]  # fmt: skip
    return "\n".join(["| | goal | measured |", "| --- | --- | --- |", *(f"| {a} | {b} | {c} |" for a, b, c in rows)])


async def measure(server: Server, args: argparse.Namespace) -> None:
    chance, client = random.Random(args.seed), Client(server.url)
    warm = [make(chance, i, args.model) for i in range(40)]
    mix = [make(chance, i, args.model) for i in range(2000)]
    await capacity(client, warm, 4, 5)
    at_capacity = await capacity(client, mix, args.clients, 12)
    print(f"capacity {at_capacity:.1f}/s", flush=True)
    found = await flood(server, client, mix, args.times * at_capacity, args.seconds, args.seed)
    await client.close()
    print(report(found, at_capacity))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="?")
    parser.add_argument("--url")
    parser.add_argument("--model", default="ernie-pocket")
    parser.add_argument("--port", type=int, default=18700)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--times", type=float, default=5)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.url is None and args.config is None:
        parser.error("give a CONFIG.yaml to serve, or --url")
    with (
        nullcontext(Server(args.url))
        if args.url
        else serving(args.config, args.port, Path(f"{args.config.stem}.log")) as server
    ):
        asyncio.run(measure(server, args))


if __name__ == "__main__":
    main()
