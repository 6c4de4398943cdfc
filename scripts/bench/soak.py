"""What a server becomes under steady load for a long time: memory, files, threads, KV blocks, and latency per minute.

    python scripts/bench/soak.py CONFIG.yaml [--minutes 30] [--share 0.7] [--rate R] [--csv soak.csv] [--svg soak.svg]

Starts the server, finds its capacity with clients that wait for each answer (unless --rate says how many requests a second),
then sends `share` of that as Poisson arrivals: the mix of overload.py, streamed. Every minute becomes a row of the CSV, with
the memory of each kind of process, and a point of the plot. The summary gives slopes, without the first fifth of the time, in
which caches fill. A slope of nothing is what to look for. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import itertools
import random
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from overload import Asked, capacity, make, percentile
from overloaded.client import Answer, Client
from own_server import Server, serving, weights_of

from ernie_cluster.bench.plot import Panel, Series, drawn

MIB = 1 << 20
WARM_SHARE = 0.2
MINUTE_S = 60.0


@dataclass
class Minute:
    """One row."""

    end_s: float
    requests: int = 0
    failed: int = 0
    """Other statuses than 200, refusals aside, and connections that broke."""
    refused: int = 0
    ttft_s: list[float] = field(default_factory=list)
    itl_s: list[float] = field(default_factory=list)
    kv_blocks: int = 0
    """Used at its end."""
    files: int = 0
    threads: int = 0
    rss: Counter[str] = field(default_factory=Counter)
    """Bytes, by kind of process."""
    processes: int = 0

    def note(self, answer: Answer | None) -> None:
        """What became of a request; None = the connection broke."""
        self.requests += 1
        if answer is None or answer.status not in (200, 429, 503):
            self.failed += 1
        elif answer.status != 200:
            self.refused += 1
        else:
            self.ttft_s.append(answer.first_s)
            self.itl_s += answer.gaps_s

    def row(self, kinds: Iterable[str]) -> dict[str, object]:
        """As the CSV has it."""
        times = {
            f"{name}_{label}_ms": round(1e3 * percentile(values, share), 2)
            for name, values in (("ttft", self.ttft_s), ("itl", self.itl_s))
            for label, share in (("p50", 0.5), ("p99", 0.99))
        }
        return {
            "end_s": round(self.end_s, 1),
            "requests": self.requests,
            "failed": self.failed,
            "refused": self.refused,
            **times,
            "kv_blocks": self.kv_blocks,
            "processes": self.processes,
            "files": self.files,
            "threads": self.threads,
            "rss_mib": round(sum(self.rss.values()) / MIB, 1),
            **{f"rss_mib {kind}": round(self.rss[kind] / MIB, 1) for kind in kinds},
        }


def slope(times_s: Sequence[float], values: Sequence[float]) -> float:
    """Per hour, by least squares; 0 of fewer than two. Times 0, 3600 and values 1, 5 give 4."""
    if len(times_s) < 2:
        return 0.0
    mean_t, mean_v = sum(times_s) / len(times_s), sum(values) / len(values)
    spread = sum((t - mean_t) ** 2 for t in times_s)
    return 3600 * sum((t - mean_t) * (v - mean_v) for t, v in zip(times_s, values, strict=True)) / spread


def summary(minutes: Sequence[Minute]) -> str:
    """Slopes and totals, as lines of a table."""
    late = minutes[int(len(minutes) * WARM_SHARE) :]
    times = [m.end_s for m in late]
    kinds = sorted({kind for m in late for kind in m.rss})
    rows = [("requests, failed, refused", f"{sum(m.requests for m in minutes)}, {sum(m.failed for m in minutes)}, {sum(m.refused for m in minutes)}")]  # fmt: skip
    rows += [(f"memory of {kind}", f"{slope(times, [m.rss[kind] / MIB for m in late]):+.1f} MiB/h") for kind in kinds]
    for what, values in (
        ("memory of all", [sum(m.rss.values()) / MIB for m in late]),
        ("files", [float(m.files) for m in late]),
        ("threads", [float(m.threads) for m in late]),
        ("KV blocks in use", [float(m.kv_blocks) for m in late]),
        ("TTFT p50, ms", [1e3 * percentile(m.ttft_s, 0.5) for m in late if m.ttft_s]),
        ("ITL p50, ms", [1e3 * percentile(m.itl_s, 0.5) for m in late if m.itl_s]),
    ):
        unit = "MiB/h" if what.startswith("memory") else "/h"
        known = times[len(times) - len(values) :]
        rows.append((what, f"{slope(known, values):+.1f} {unit}"))
    return "\n".join(["| | slope |", "| --- | --- |", *(f"| {what} | {value} |" for what, value in rows)])


def panels(minutes: Sequence[Minute]) -> list[Panel]:
    """Memory, files and threads, and latency, one below the other."""
    colors = ("#0a58ca", "#d9822b", "#2b9348", "#8338ec", "#6c757d", "#c1121f", "#118ab2")
    kinds = [kind for kind, _ in sum((m.rss for m in minutes), Counter()).most_common(len(colors) - 1)]
    memory = [Series(k, c, [m.rss[k] / MIB for m in minutes]) for k, c in zip(kinds, colors, strict=False)]
    memory.append(
        Series("others", colors[-1], [sum(v for k, v in m.rss.items() if k not in kinds) / MIB for m in minutes])
    )
    counts = [
        Series(name, color, [float(getattr(m, name)) for m in minutes])
        for name, color in zip(("files", "threads", "kv_blocks"), colors, strict=False)
    ]
    return [
        Panel("memory by kind of process", "MiB", areas=memory[:4]),
        Panel("files, threads, KV blocks", "", lines=counts),
        _times("TTFT", [m.ttft_s for m in minutes]),
        _times("ITL", [m.itl_s for m in minutes]),
    ]


def _times(name: str, values: Sequence[Sequence[float]]) -> Panel:
    lines = [
        Series(label, color, [1e3 * percentile(v, share) if v else None for v in values])
        for label, share, color in (("p50", 0.5, "#0a58ca"), ("p99", 0.99, "#d9822b"))
    ]
    return Panel(name, "ms", lines=lines)


def kv_blocks_in(metrics: bytes) -> int:
    """Used ones, of all replicas."""
    found = re.findall(rb'^ernie_kv_blocks{[^}]*state="used"[^}]*} (\S+)$', metrics, re.M)
    return int(sum(map(float, found)))


async def soak(
    server: Server, client: Client, mix: Sequence[Asked], rate: float, num_minutes: int, seed: int
) -> list[Minute]:
    """Send at this rate for so long; a row per minute, told as it comes."""
    chance, tasks = random.Random(seed), set[asyncio.Task[None]]()
    numbers = itertools.count()
    start_s = due_s = time.monotonic()
    minutes: list[Minute] = []

    async def one(minute: Minute) -> None:
        try:
            answer: Answer | None = await client.send(mix[next(numbers) % len(mix)].raw)
        except (OSError, EOFError):
            answer = None
        minute.note(answer)

    for number in range(1, num_minutes + 1):
        minute = Minute(number * MINUTE_S)
        while due_s < start_s + minute.end_s:
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            task = asyncio.create_task(one(minute))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            due_s += chance.expovariate(rate)
        await asyncio.sleep(max(0.0, start_s + minute.end_s - time.monotonic()))
        minute.kv_blocks = kv_blocks_in((await client.get("/metrics")).body)
        for kind, weight in (await asyncio.to_thread(weights_of, server)).items():
            minute.rss[kind] = weight.rss_bytes
            minute.files += weight.files
            minute.threads += weight.threads
            minute.processes += weight.processes
        minutes.append(minute)
        said = minute.row(())
        print("  ".join(f"{name} {value}" for name, value in said.items()), flush=True)
    await asyncio.gather(*tasks)
    return minutes


async def measure(server: Server, args: argparse.Namespace) -> list[Minute]:
    chance, client = random.Random(args.seed), Client(server.url)
    mix = [make(chance, number, args.model, stream=True) for number in range(500)]
    rate = args.rate
    if rate is None:
        await capacity(client, mix[:40], 4, 5)
        at_capacity = await capacity(client, mix, args.clients, 20)
        rate = args.share * at_capacity
        print(f"capacity {at_capacity:.2f}/s, {args.share:.0%} of it is {rate:.2f}/s", flush=True)
    minutes = await soak(server, client, mix, rate, args.minutes, args.seed)
    await client.close()
    return minutes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--minutes", type=int, default=30)
    parser.add_argument("--share", type=float, default=0.7)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--model", default="ernie-pocket")
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--port", type=int, default=18720)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, default=Path("soak.csv"))
    parser.add_argument("--svg", type=Path, default=Path("soak.svg"))
    args = parser.parse_args()
    if args.minutes < 2:
        parser.error("--minutes: a slope needs two at least")
    with serving(args.config, args.port, Path(f"{args.config.stem}.log")) as server:
        minutes = asyncio.run(measure(server, args))
    kinds = sorted({kind for minute in minutes for kind in minute.rss})
    rows = [minute.row(kinds) for minute in minutes]
    with args.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    args.svg.write_text(drawn([minute.end_s for minute in minutes], panels(minutes)))
    print(summary(minutes))


if __name__ == "__main__":
    main()
