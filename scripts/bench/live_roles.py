"""Goodput of role switching beside fixed splits, with real processes: n replicas of a tiny model at an imagined speed.

    python scripts/bench/live_roles.py --replay                        # on paper, in seconds: is the load well chosen?
    python scripts/bench/live_roles.py --splits 3 4 5                  # a server of its own for each split
    python scripts/bench/live_roles.py --scaling FILE [--splits ...]   # one server: splits by /admin, then switching

The load alternates between two phases of equal length: long prompts with short answers, and short prompts with long
answers. The work that they make is the same, but the ratio of prefill to decode differs by `--shift`. Requests come by
chance, from a seed, whatever became of those before. Goodput: requests per second that kept both targets; who was
refused or failed did not. FILE is YAML that is laid over the configuration and lets roles change, such as

    scaling: {switch_roles: true}
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import yaml
from live.client import Seen, lag_s, play
from live.server import serving, set_split

from ernie_cluster.actors.environment import free_port
from ernie_cluster.cli.tiny_checkpoint import write_tiny_checkpoint
from ernie_cluster.config.emulate import EmulateConfig
from ernie_cluster.config.router import RouterConfig
from ernie_cluster.config.scaling import ModelBounds, PoolBounds, ScalingConfig, Targets
from ernie_cluster.policy.replay.machine import Costs, Job
from ernie_cluster.policy.replay.replay import Replay
from ernie_cluster.policy.replay.routes import PolicyRoute
from ernie_cluster.policy.replay.workload import LoadPhase, jobs_of

MODEL = "tiny"
# reading KV is most of a decode step: larger batches then add little, and a stage that is too small falls behind for good
EMULATE = EmulateConfig(chunk_s=0.1, token_s=0.0038, step_s=0.04, kv_token_s=120e-6)
TARGETS = Targets(ttft_s=4.0, tpot_s=0.2, queue_s=2.0)
BATCH_TOKENS, MAX_SEQS, KV_TOKENS = 64, 64, 16_000
QUEUE_TOKENS = 1500
"""Per replica, above which the router refuses: eight seconds of prefill, twice the target of TTFT."""
HAND_OVER_S = 0.12
"""From the first token until a decode step begins that has the request in it: half a step, and the transfer."""
PROMPT, ANSWER = 110, 30
"""Tokens, between the two phases."""
ENGINE = {
    "kv_cache_bytes": KV_TOKENS * 4 * 2 * 2 * 32 * 4,  # layers, K and V, heads, their width, float32
    "max_batch_tokens": BATCH_TOKENS,
    "max_num_seqs": MAX_SEQS,
    "num_threads": 1,
    "emulate": asdict(EMULATE),
}
MAX_LAG_S = 0.05
"""Of the client, else the run does not count."""
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Row:
    """One run."""

    how: str
    goodput_per_s: float
    share: float
    """Of all requests, that kept both targets."""
    by_phase: tuple[float, ...]
    """The same share for the requests of each phase."""
    requests: int
    refused: int
    failed: int
    ttft_p90_s: float
    tpot_p90_s: float
    lag_s: float = 0.0

    def __str__(self) -> str:
        phases = " ".join(f"{share:4.0%}" for share in self.by_phase)
        return (
            f"{self.how:>10}  {self.goodput_per_s:6.2f}/s  {self.share:6.1%} [{phases}]  refused {self.refused:4}, failed "
            f"{self.failed:3} of {self.requests}  TTFT p90 {self.ttft_p90_s:5.2f} s  TPOT p90 {self.tpot_p90_s * 1000:5.1f} ms"
            f"  lag {self.lag_s * 1000:3.0f} ms"
        )


def work_s(prompt: float, answer: float) -> tuple[float, float]:
    """Replica seconds of one request: prefill, and decode in batches as large as the target of TPOT allows."""
    tpot_s = 0.85 * TARGETS.tpot_s  # chance makes some batches larger, and the second token waits for its first step
    room = min(MAX_SEQS, (tpot_s - EMULATE.step_s) / EMULATE.kv_token_s / (prompt + answer / 2))
    return prompt / costs().prefill_rate(), answer * tpot_s / room


def phases_of(replicas: int, load: float, shift: float, seconds: float, count: int) -> list[LoadPhase]:
    """Phases whose work is `load` of what all replicas can do together, and whose ratios of prefill to decode differ by `shift`.

    The mean lengths are those of `PROMPT` and `ANSWER` times, or over, a factor that gives the ratio.
    """
    low, high = 1.0, shift
    while high - low > 1e-6:  # of work; that of tokens is another, as contexts grow
        factor = (low + high) / 2
        (p, d), (q, e) = (work_s(*lengths) for lengths in _lengths(factor))
        low, high = (factor, high) if p / d / (q / e) < shift else (low, factor)
    both = _lengths(low)
    return [
        LoadPhase(seconds, load * replicas / sum(work_s(*both[i % 2])), *both[i % 2], model=MODEL) for i in range(count)
    ]


def _lengths(factor: float) -> tuple[tuple[float, float], tuple[float, float]]:
    root = factor**0.5
    return (PROMPT * root, ANSWER / root), (PROMPT / root, ANSWER * root)


def costs() -> Costs:
    """The imagined hardware as the replay knows it."""
    return Costs(
        base_s=EMULATE.step_s,
        per_kv_token_s=EMULATE.kv_token_s,
        per_prompt_token_s=EMULATE.token_s + (EMULATE.chunk_s - EMULATE.step_s) / BATCH_TOKENS,
        chunk_tokens=BATCH_TOKENS,
        kv_tokens=KV_TOKENS,
        transfer_token_s=HAND_OVER_S / PROMPT,
    )


def row_of(how: str, seen: Sequence[Seen], phases: Sequence[LoadPhase]) -> Row:
    """What a run came to."""
    seconds = sum(p.seconds for p in phases)
    good = [s for s in seen if s.keeps(TARGETS.ttft_s, TARGETS.tpot_s)]
    whole = [s for s in seen if s.is_whole]
    by_phase, start_s = [], 0.0
    for phase in phases:
        mine = [s for s in seen if start_s <= s.due_s < start_s + phase.seconds]
        by_phase.append(sum(s.keeps(TARGETS.ttft_s, TARGETS.tpot_s) for s in mine) / max(1, len(mine)))
        start_s += phase.seconds
    return Row(
        how=how,
        goodput_per_s=len(good) / seconds,
        share=len(good) / max(1, len(seen)),
        by_phase=tuple(by_phase),
        requests=len(seen),
        refused=sum(s.is_refused for s in seen),
        failed=sum(not s.is_whole and not s.is_refused for s in seen),
        ttft_p90_s=p90([s.ttft_s for s in whole]),
        tpot_p90_s=p90([s.tpot_s for s in whole]),
        lag_s=lag_s(seen),
    )


def p90(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[int(0.9 * len(ordered))] if ordered else 0.0


def replayed(how: str, replicas: int, jobs: Sequence[Job], is_scaling: bool = False) -> list[Seen]:
    """The same run on paper; `how` is a number of prefill replicas to begin with."""
    pools = tuple(PoolBounds(role, 1) for role in ("prefill", "decode"))
    config = ScalingConfig((ModelBounds(MODEL, pools, TARGETS),), total_gpus=replicas)
    replay = Replay(
        {MODEL: costs()}, PolicyRoute(RouterConfig(max_queued_tokens=QUEUE_TOKENS)), config, is_scaling=is_scaling
    )
    prefill = int(how)
    result = replay.run([replace(j) for j in jobs], {MODEL: {"prefill": prefill, "decode": replicas - prefill}})
    return [
        Seen(
            MODEL, j.arrived_s, j.arrived_s, j.prompt_tokens, j.output_tokens, 429 if j.is_refused else 200,
            j.first_s, j.done_s, 0 if j.is_refused else j.output_tokens,
        )
        for j in result.jobs
    ]  # fmt: skip


def config_of(replicas: int, prefill: int, checkpoint: Path, port: int, more: Mapping[str, Any]) -> dict[str, Any]:
    """A server's configuration with so many replicas, `more` laid over it."""
    pools = [
        {"role": "prefill", "num_replicas": prefill, "num_cpus": 0.1},
        {"role": "decode", "num_replicas": replicas - prefill, "num_cpus": 0.1},
    ]
    engine = ENGINE | {"enable_prefix_cache": False}  # the runs on one server have the same prompts
    model = {"name": MODEL, "path": str(checkpoint), "pools": pools, "engine": engine}
    api = {"port": port, "decode_processes": 0, "playground": False}
    return overlaid({"models": [model], "router": {"max_queued_tokens": QUEUE_TOKENS}, "api": api}, more)


def overlaid(base: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """`more` laid over `base`, key by key and item by item."""
    out = dict(base)
    for key, value in more.items():
        below = out.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            out[key] = overlaid(below, value)
        elif isinstance(below, list) and isinstance(value, list):
            pairs = zip(below, value, strict=False)
            out[key] = [overlaid(b, v) for b, v in pairs] + below[len(value) :] + value[len(below) :]
        else:
            out[key] = value
    return out


def live(args: argparse.Namespace, jobs: list[Job], phases: Sequence[LoadPhase], folder: Path) -> list[Row]:
    """All runs over HTTP; with `--scaling` on one server, where the split is ordered and the last run is left to itself."""
    more = yaml.safe_load(args.scaling.read_text()) if args.scaling else {}
    checkpoint = write_tiny_checkpoint(folder / "tiny")
    rows = []
    if args.scaling:
        fixed = overlaid(config_of(args.replicas, args.replicas // 2, checkpoint, free_port(), more), OFF)
        with serving(fixed, folder) as port:
            for prefill in args.splits:
                set_split(port, MODEL, prefill)
                rows.append(shown(f"{prefill} + {args.replicas - prefill}", jobs, port, phases))
        free = config_of(args.replicas, args.replicas // 2, checkpoint, free_port(), more)
        with serving(free, folder) as port:
            rows.append(shown("switching", jobs, port, phases))
        return rows
    for prefill in args.splits:
        with serving(config_of(args.replicas, prefill, checkpoint, free_port(), more), folder) as port:
            rows.append(shown(f"{prefill} + {args.replicas - prefill}", jobs, port, phases))
    return rows


OFF: dict[str, Any] = {"scaling": None}
"""Laid over the configuration where splits are fixed."""


def shown(how: str, jobs: list[Job], port: int, phases: Sequence[LoadPhase]) -> Row:
    """One run, printed when it is over."""
    warm = [Job(-1 - i, MODEL, 0.1 * i, 64, 4) for i in range(20)]
    asyncio.run(play(warm, port, TIMEOUT_S))
    row = row_of(how, asyncio.run(play(jobs, port, TIMEOUT_S)), phases)
    print(row, flush=True)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--splits", type=int, nargs="+", help="prefill replicas of each fixed split; default: all")
    parser.add_argument("--load", type=float, default=0.9, help="of what all replicas can do together")
    parser.add_argument("--shift", type=float, default=3.0, help="of the ratio of prefill to decode work")
    parser.add_argument("--seconds", type=float, default=50.0, help="of a phase")
    parser.add_argument("--phases", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--replay", action="store_true", help="on paper")
    parser.add_argument("--scaling", type=Path, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows here")
    args = parser.parse_args()
    args.splits = args.splits or list(range(1, args.replicas))
    phases = phases_of(args.replicas, args.load, args.shift, args.seconds, args.phases)
    jobs = list(jobs_of(phases, args.seed))
    for phase in phases[:2]:
        p, d = (phase.requests_per_s * s for s in work_s(phase.prompt_tokens, phase.output_tokens))
        print(
            f"{phase.seconds:g} s of {phase.requests_per_s:.1f} requests/s, {phase.prompt_tokens:.0f} + "
            f"{phase.output_tokens:.0f} tokens: work for {p:.2f} prefill and {d:.2f} decode replicas"
        )
    if args.replay:
        rows = [
            row_of(f"{k} + {args.replicas - k}", replayed(str(k), args.replicas, jobs), phases) for k in args.splits
        ]
        rows.append(row_of("switching", replayed(str(args.replicas // 2), args.replicas, jobs, True), phases))
        print(*rows, sep="\n")
    else:
        with tempfile.TemporaryDirectory(prefix="live-roles-") as folder:
            rows = live(args, jobs, phases, Path(folder))
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
    fixed = [r for r in rows if r.how != "switching"]
    best = max(fixed, key=lambda r: r.goodput_per_s)
    if rows[-1].how == "switching":
        print(f"switching {rows[-1].goodput_per_s / best.goodput_per_s:.2f} times the best fixed split, {best.how}")
    if any(r.lag_s > MAX_LAG_S for r in rows):
        print(f"the client lagged by more than {1000 * MAX_LAG_S:.0f} ms: these figures do not count")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
