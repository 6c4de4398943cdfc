"""Replay a load whose prefill / decode ratio shifts threefold and back: role switching beside every fixed split.

    python scripts/bench/scaling.py [--replicas 8 64 1000] [--json FILE] [--svg FILE] [--queue-tokens N] [--load SHARE]

Nothing is served: `policy.replay` runs `policy.scaling` over replicas on paper, of imagined speeds: about those of
ERNIE-4.5-VL-424B on 8 H100 each, if these multiplied its weights in fp8. Goodput: the share of all requests, refused ones
included, that kept both targets. Up to 64 replicas every split is tried, and all mixed, which is no split but needs no
switching either; of 1,000 the five around the middle. Eight replicas are routed by `policy.routing`, more by
its rule in short.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ernie_cluster.config.router import RouterConfig
from ernie_cluster.config.scaling import ModelBounds, PoolBounds, ScalingConfig, Targets
from ernie_cluster.policy.replay.machine import Costs, Job
from ernie_cluster.policy.replay.replay import Replay, Result
from ernie_cluster.policy.replay.routes import LeastLoaded, PolicyRoute, Route
from ernie_cluster.policy.replay.workload import LoadPhase, jobs_of
from ernie_cluster.policy.scaling.actions import SwitchRole

COSTS = Costs(
    base_s=0.0152,  # 16 sequences of 8,000 tokens: 17.5 ms; 64: 24.3 ms
    per_kv_token_s=1.77e-8,
    per_prompt_token_s=2.0e-5,  # with base_s per chunk of 2,048: 24,000 tokens in 0.66 s (roofline 0.71), 8,000 in 0.22 (0.21)
    chunk_tokens=2048,
    kv_tokens=1_419_000,
    transfer_token_s=1e-7,  # 221 KB per token over 8 links of 50 GB/s, layer by layer: about a fifth is not hidden
)
TARGETS = Targets(ttft_s=2.0, tpot_s=0.020, queue_s=1.0)
PROMPT, SHORT, LONG = 16_000, 180, 540
"""Tokens: the same prompts, answers three times as long and back."""
GPUS = 8


@dataclass(frozen=True)
class Row:
    """One run."""

    replicas: int
    how: str
    goodput: float
    requests: int
    refused: int
    ttft_p90_s: float
    tpot_p90_s: float
    switches: int
    cpu_s: float


def work_s(answer: int) -> tuple[float, float]:
    """Replica seconds of one request: prefill, and decode in batches as large as the target of TPOT allows."""
    tpot_s = 0.95 * TARGETS.tpot_s
    room = (tpot_s - COSTS.base_s) / COSTS.per_kv_token_s
    return PROMPT / COSTS.prefill_rate(), answer * tpot_s * (PROMPT + answer / 2) / room


def load_of(replicas: int, share: float, seconds: float) -> list[LoadPhase]:
    """Short answers, long ones, short ones, as long as both kinds have the same time.

    Every phase would take `share` of what all replicas can do together.
    """
    return [
        LoadPhase(times * seconds, share * replicas / sum(work_s(answer)), PROMPT, answer)
        for times, answer in ((1, SHORT), (2, LONG), (1, SHORT))
    ]


def bounds_of(replicas: int) -> ScalingConfig:
    pools = tuple(PoolBounds(role, GPUS) for role in ("prefill", "decode", "mixed"))
    return ScalingConfig((ModelBounds("m", pools, TARGETS),), total_gpus=GPUS * replicas)


def run(replicas: int, how: str, fleet: dict[str, int], jobs: Sequence[Job], route: Route) -> tuple[Row, Result]:
    config = bounds_of(replicas)
    if how == "switching":
        pools = tuple(replace(p, max_replicas=0) if p.role == "mixed" else p for p in config.models[0].pools)
        config = replace(config, models=(replace(config.models[0], pools=pools),))
    began = time.process_time()
    replay = Replay({"m": COSTS}, route, config, is_scaling=how == "switching")
    result = replay.run([replace(j) for j in jobs], {"m": fleet})  # type: ignore[dict-item]
    served = [j for j in result.jobs if not j.is_refused]
    row = Row(
        replicas=replicas,
        how=how,
        goodput=result.goodput(TARGETS.ttft_s, TARGETS.tpot_s),
        requests=len(result.jobs),
        refused=len(result.jobs) - len(served),
        ttft_p90_s=p90([j.ttft_s for j in served]),
        tpot_p90_s=p90([j.tpot_s for j in served]),
        switches=sum(len(a.replica_ids) for _, a in result.actions if isinstance(a, SwitchRole)),
        cpu_s=time.process_time() - began,
    )
    print(
        f"{row.replicas:5} {row.how:>12}  goodput {row.goodput:6.1%}  refused {row.refused:6} of {row.requests}  "
        f"TTFT p90 {row.ttft_p90_s:6.2f} s  TPOT p90 {row.tpot_p90_s * 1000:5.1f} ms  "
        f"switches {row.switches:4}  {row.cpu_s:5.1f} s of CPU",
        flush=True,
    )
    return row, result


def p90(values: list[float]) -> float:
    return sorted(values)[int(0.9 * len(values))] if values else 0.0


def measure(replicas: int, limits: RouterConfig, share: float, seconds: float) -> tuple[list[Row], Result]:
    """All runs at one size; rows with the switching one first, and its result."""
    jobs = list(jobs_of(load_of(replicas, share, seconds), seed=replicas))
    route: Route = PolicyRoute(limits) if replicas <= 8 else LeastLoaded(limits)
    half = replicas // 2
    row, result = run(replicas, "switching", {"prefill": half, "decode": replicas - half}, jobs, route)
    rows = [row]
    splits = range(1, replicas) if replicas <= 64 else [round(replicas * s) for s in (0.36, 0.43, 0.5, 0.57, 0.64)]
    for prefill in splits:
        fleet = {"prefill": prefill, "decode": replicas - prefill}
        rows.append(run(replicas, f"{prefill} + {replicas - prefill}", fleet, jobs, route)[0])
    rows.append(run(replicas, "all mixed", {"mixed": replicas}, jobs, route)[0])
    return rows, result


def summary(rows: Sequence[Row]) -> str:
    switching, mixed = rows[0], rows[-1]
    best = max(rows[1:-1], key=lambda r: r.goodput)
    return (
        f"| {switching.replicas} | {switching.requests} | {switching.goodput:.1%} | {best.goodput:.1%} ({best.how}) | "
        f"**{switching.goodput / best.goodput:.2f}** | {mixed.goodput:.1%} | {switching.switches} |"
    )


def drawn(results: Sequence[tuple[int, float, Result]]) -> str:
    """SVG: the share of prefill replicas over time, one panel per size, phases shaded."""
    width, height, left, top = 640, 130, 60, 30
    parts: list[str] = []
    for i, (replicas, seconds, result) in enumerate(results):
        end_s = 4 * seconds
        y0 = top + i * (height + 45)
        shade = left + width / 4
        parts.append(f'<rect x="{shade:.0f}" y="{y0}" width="{width / 2:.0f}" height="{height}" fill="#eee"/>')
        points = []
        for at_s, counts in result.counts:
            if at_s <= end_s:
                share = counts.get(("m", "prefill"), 0) / replicas
                points.append(f"{left + width * at_s / end_s:.1f},{y0 + height * (1 - share):.1f}")
        parts.append(f'<rect x="{left}" y="{y0}" width="{width}" height="{height}" fill="none" stroke="#888"/>')
        parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="#0a58ca" stroke-width="2"/>')
        parts.append(f'<text x="{left}" y="{y0 - 8}">{replicas} replicas: share that prefills</text>')
        parts += [
            f'<text x="{left - 38}" y="{y0 + height * (1 - share) + 4:.0f}">{share:.0%}</text>' for share in (0, 0.5, 1)
        ]
        parts.append(f'<text x="{shade + 6:.0f}" y="{y0 + 16}">answers three times as long</text>')
        parts.append(f'<text x="{left + width - 40}" y="{y0 + height + 16}">{end_s:.0f} s</text>')
    total = top + len(results) * (height + 45)
    width_px = left + width + 20
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width_px}" height="{total}" viewBox="0 0 {width_px} {total}" '
    )
    return head + 'font-family="sans-serif" font-size="12">' + "".join(parts) + "</svg>\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--replicas", type=int, nargs="+", default=[8, 64, 1000])
    parser.add_argument("--load", type=float, default=0.9, help="of what all replicas can do together")
    parser.add_argument("--seconds", type=float, help="of the first phase; 240 up to 8 replicas, 90 up to 64, else 45")
    parser.add_argument("--queue-tokens", type=int, default=RouterConfig().max_queued_tokens)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--svg", type=Path)
    args = parser.parse_args()
    limits = RouterConfig(max_queued_tokens=args.queue_tokens)
    rows: list[Row] = []
    results: list[tuple[int, float, Result]] = []
    lines: list[str] = []
    for replicas in args.replicas:
        seconds = args.seconds or (240.0 if replicas <= 8 else 90.0 if replicas <= 64 else 45.0)
        found, result = measure(replicas, limits, args.load, seconds)
        rows += found
        results.append((replicas, seconds, result))
        lines.append(summary(found))
    print("\n| replicas | requests | switching | best fixed split | ratio | all mixed | replicas switched |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(lines))
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
    if args.svg:
        args.svg.write_text(drawn(results))


if __name__ == "__main__":
    main()
