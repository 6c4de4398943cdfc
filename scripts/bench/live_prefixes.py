"""What the router's choices save, with real processes: chats whose prompts share prefixes, and pictures that come again.

    python scripts/bench/live_prefixes.py [--trace FILE] [--every 6] [--seconds 400] [--load 1.0]

One server after the other, with the same replicas of a tiny model at an imagined speed, and another `router.policy` each:
in turn, the less busy of two as Ray Serve has it, and by cost.

Prompts: as in prefixes.py, to mixed replicas. Of the trace every so many-th chat is
taken, whole, and its time is shortened. What one endless cache would find of it is the most that can be found.
Pictures: some come much more often than others; the text before each is new, so that no prefix saves their encoding.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import random
import statistics
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from live.client import STREAMED, TOKEN_IDS, Seen, completion, lag_s, play
from live.server import serving
from PIL import Image
from prefixes import make_trace, read_trace

from ernie_cluster.actors.environment import free_port
from ernie_cluster.cli.tiny_checkpoint import write_tiny_checkpoint
from ernie_cluster.policy.replay.machine import Job
from ernie_cluster.policy.replay.prefixes import BLOCK_TOKENS, Arrival, one_cache

MODEL = "tiny"
TOKEN_BYTES = 4 * 2 * 2 * 32 * 4
"""Of KV: layers, K and V, heads, their width, float32."""
ANSWER = 4
MAX_PROMPT = 4000
TIMEOUT_S = 500.0
POLICIES: dict[str, dict[str, Any]] = {
    "in turn": {"policy": "round_robin"},
    "of two": {"policy": "two_choices"},
    "by cost": {},
}
ENCODERS, PICTURE_S = 4, 0.25
MAX_LAG_S = 0.05


def chats(trace: Sequence[Arrival], every: int, seconds: float) -> list[Arrival]:
    """Every so many-th chat, in so many seconds. All prompts begin alike; those of a chat share the next block, too."""
    heads = dict.fromkeys(a.chain[:2][-1] for a in trace)
    kept = set(list(heads)[::every])
    mine = [a for a in trace if a.chain[:2][-1] in kept and a.num_tokens <= MAX_PROMPT]
    first_s, whole_s = mine[0].time_s, mine[-1].time_s - mine[0].time_s
    return [replace(a, time_s=(a.time_s - first_s) * seconds / whole_s) for a in mine]


def token_ids(arrival: Arrival) -> list[int]:
    """A block's number says what is in it."""
    ids = [i for block in arrival.chain for i in random.Random(block).choices(TOKEN_IDS, k=BLOCK_TOKENS)]
    return ids[: arrival.num_tokens]


def config_of(
    pools: dict[str, int], blocks: int, emulate: dict[str, float], router: dict[str, Any], folder: Path
) -> dict[str, Any]:
    return {
        "models": [
            {
                "name": MODEL,
                "path": str(folder / "tiny"),
                "pools": [{"role": role, "num_replicas": n, "num_cpus": 0.1} for role, n in pools.items()],
                "engine": {
                    "kv_cache_bytes": (blocks + 1) * BLOCK_TOKENS * TOKEN_BYTES,
                    "max_batch_tokens": 256,
                    "max_num_seqs": 64,
                    "num_threads": 1,
                    "emulate": emulate,
                },
            }
        ],
        "router": {"max_queued_tokens": 10**9, "interactive_wait_s": TIMEOUT_S, "hedge_encode": 0, **router},
        "api": {"port": free_port(), "decode_processes": 0, "playground": False},
    }


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def check(seen: Sequence[Seen]) -> None:
    """A run counts if all were answered, and the client was not late."""
    lost = [s for s in seen if not s.is_whole]
    if lost:
        raise SystemExit(f"{len(lost)} of {len(seen)} were not answered, the first so: {lost[0]}")
    if lag_s(seen) > MAX_LAG_S:
        raise SystemExit(f"the client lagged by {1000 * lag_s(seen):.0f} ms: this machine is too busy for the load")


def warm_up(port: int) -> None:
    jobs = [Job(-1 - i, MODEL, 0.3 * i, 200, ANSWER) for i in range(24)]
    check(asyncio.run(play(jobs, port, TIMEOUT_S)))


def measure_prompts(trace: Sequence[Arrival], args: argparse.Namespace, folder: Path) -> None:
    endless, whole_s = one_cache(trace, 10**9), trace[-1].time_s
    num_tokens = sum(a.num_tokens for a in trace)
    speed = num_tokens / whole_s / args.load / args.replicas
    emulate = {"chunk_s": 0.02, "token_s": 1 / speed, "step_s": 0.02}
    jobs = [Job(i, MODEL, a.time_s, a.num_tokens, ANSWER) for i, a in enumerate(trace)]
    print(
        f"{len(trace)} prompts of {num_tokens / len(trace):.0f} tokens in {whole_s:.0f} s, {args.replicas} mixed replicas of "
        f"{args.blocks} blocks, {speed:.0f} tokens/s, load {args.load:.0%}\n"
        f"  one endless cache finds {endless:.1%}, one of a replica's size {one_cache(trace, args.blocks):.1%}\n"
        f"  {'':10}{'found':>7}{'of endless':>12}{'TTFT mean':>11}{'p50':>9}{'p90':>9}{'p99':>9}"
    )
    p90 = {}
    for name, router in POLICIES.items():
        with serving(config_of({"mixed": args.replicas}, args.blocks, emulate, router, folder), folder) as port:
            warm_up(port)
            seen = asyncio.run(
                play(jobs, port, TIMEOUT_S, body=lambda job: completion(job, token_ids(trace[job.number])))
            )
        check(seen)
        found, ttft = sum(s.cached for s in seen) / num_tokens, [s.ttft_s for s in seen]
        p90[name] = quantile(ttft, 0.9)
        times = [statistics.mean(ttft), *(quantile(ttft, q) for q in (0.5, 0.9, 0.99))]
        print(f"  {name:10}{found:7.1%}{found / endless:12.1%}  " + "".join(f"{t:7.2f} s" for t in times), flush=True)
    best = p90["by cost"]
    print("  p90 over that by cost: " + ", ".join(f"{name} {t / best:.2f}" for name, t in p90.items()))


def picture(number: int) -> str:
    """A data URL."""
    file = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 256, (84, 84, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def num_encoded(port: int) -> int:
    """Pictures through the encoders so far."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith("ernie_encode_seconds_count"))


def measure_pictures(args: argparse.Namespace, folder: Path) -> None:
    chance = random.Random(3)
    asked = chance.choices(range(args.pictures), [1 / (i + 1) for i in range(args.pictures)], k=args.picture_requests)
    rate = ENCODERS / PICTURE_S * 0.6
    times, at_s = [], 0.0
    for _ in asked:
        at_s += chance.expovariate(rate)
        times.append(at_s)
    jobs = [Job(i, MODEL, t, 20, 2) for i, t in enumerate(times)]
    urls = {number: picture(number) for number in set(asked)}

    def body(job: Job) -> dict[str, object]:
        content = [
            {"type": "text", "text": f"request {job.number}"},
            {"type": "image_url", "image_url": {"url": urls[asked[job.number]]}},
        ]
        return {
            "model": MODEL,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": job.output_tokens,
        } | STREAMED

    pools = {"vision": ENCODERS, "prefill": 1, "decode": 1}
    print(f"\n{len(asked)} pictures, {len(urls)} of them different, {rate:.1f} a second, {ENCODERS} encoders")
    print(f"  {'':10}{'encoded':>8}{'saved, of what could be':>26}{'TTFT p50':>10}{'p90':>9}")
    for name, router in POLICIES.items():
        emulate = {"picture_s": PICTURE_S}
        with serving(config_of(pools, 1000, emulate, router, folder), folder) as port:
            warm_up(port)
            before = num_encoded(port)
            seen = asyncio.run(play(jobs, port, TIMEOUT_S, path="/v1/chat/completions", body=body))
            encoded = num_encoded(port) - before
        check(seen)
        saved = (len(asked) - encoded) / (len(asked) - len(urls))
        ttft = [s.ttft_s for s in seen]
        print(
            f"  {name:10}{encoded:8}{saved:26.1%}{quantile(ttft, 0.5):8.2f} s{quantile(ttft, 0.9):7.2f} s", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="JSON lines of Mooncake's kind; default: chats are made up")
    parser.add_argument("--every", type=int, default=6, help="take one of so many chats")
    parser.add_argument("--seconds", type=float, default=400.0, help="that the trace shall last")
    parser.add_argument(
        "--load", type=float, default=1.0, help="share of their time that they would read without caches"
    )
    parser.add_argument("--replicas", type=int, default=6, help="mixed ones")
    parser.add_argument("--blocks", type=int, default=2000, help="of KV that each holds")
    parser.add_argument(
        "--pictures", type=int, default=200, help="different ones that may be asked for; 0 = no pictures"
    )
    parser.add_argument("--picture-requests", type=int, default=1200)
    args = parser.parse_args()
    trace = chats(make_trace() if args.trace is None else read_trace(args.trace), args.every, args.seconds)
    with tempfile.TemporaryDirectory(prefix="live-prefixes-") as name:
        folder = Path(name)
        write_tiny_checkpoint(folder / "tiny")
        measure_prompts(trace, args, folder)
        if args.pictures:
            measure_pictures(args, folder)


if __name__ == "__main__":
    main()
