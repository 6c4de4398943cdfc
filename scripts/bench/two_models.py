"""Two models behind one door, under one budget: a burst on the first, calm, then a burst on the second.

    python scripts/bench/two_models.py [--scaling FILE] [--csv FILE] [--svg docs/scaling.svg]

Real processes: tiny models at an imagined speed, a router, an autoscaler, requests over HTTP. Each second it notes what
`GET /admin/status` says of the replicas, and what became of the requests. It ends with 0 if no request failed and no
second saw more in use than the budget. FILE is YAML to lay over the configuration.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import yaml
from live.client import Seen, lag_s, play
from live.server import Fleet, call, serving
from live_roles import ENGINE, TARGETS, overlaid, p90

from ernie_cluster.actors.environment import free_port
from ernie_cluster.bench.plot import Panel, Series, drawn
from ernie_cluster.cli.tiny_checkpoint import write_tiny_checkpoint
from ernie_cluster.policy.replay.machine import Job
from ernie_cluster.policy.replay.workload import LoadPhase, jobs_of, merged

MODELS = ("first", "second")
ROLES = ("prefill", "decode", "mixed")
COLORS = {"prefill": "#0a58ca", "decode": "#198754", "mixed": "#6f42c1", "starting": "#ffc107", "draining": "#adb5bd"}
BUDGET = 8
CALM, BURST = (150, 24), (200, 16)
"""Tokens of prompt and answer; a burst has more prompt to it, so that roles must change."""
CALM_PER_S, BURST_PER_S = 0.4, 2.6
TIMEOUT_S = 90.0


@dataclass(slots=True)
class Second:
    """What was seen at one moment, and since the one before it; lists by model, in the order of `MODELS`."""

    at_s: float
    fleet: Fleet
    offered: list[int]
    finished: list[int]
    refused: list[int]
    failed: list[int]
    ttft_p90_s: list[float | None]


@dataclass(slots=True)
class Recorder:
    """Makes a `Second` of what has ended since the one before."""

    jobs: Sequence[Job]
    seconds: list[Second] = field(default_factory=list)
    _ended: list[Seen] = field(default_factory=list)

    def ended(self, seen: Seen) -> None:
        self._ended.append(seen)

    def note(self, at_s: float, fleet: Fleet) -> None:
        """A look at the replicas."""
        since_s = self.seconds[-1].at_s if self.seconds else -1.0
        second = Second(at_s, fleet, [], [], [], [], [])
        for model in MODELS:
            mine = [s for s in self._ended if s.model == model]
            whole = [s.ttft_s for s in mine if s.is_whole]
            second.offered.append(sum(j.model == model and since_s < j.arrived_s <= at_s for j in self.jobs))
            second.finished.append(len(whole))
            second.refused.append(sum(s.is_refused for s in mine))
            second.failed.append(sum(not s.is_whole and not s.is_refused for s in mine))
            second.ttft_p90_s.append(p90(whole) if whole else None)
        self._ended.clear()
        self.seconds.append(second)


def phases_of(calm_s: float, burst_s: float) -> dict[str, list[LoadPhase]]:
    """Load of each model."""

    def phase(model: str, seconds: float, is_burst: bool) -> LoadPhase:
        per_s, tokens = (BURST_PER_S, BURST) if is_burst else (CALM_PER_S, CALM)
        return LoadPhase(seconds, per_s, *tokens, model=model)

    shape = ((calm_s / 2, None), (burst_s, "first"), (calm_s, None), (burst_s, "second"), (calm_s, None))
    return {m: [phase(m, s, busy == m) for s, busy in shape] for m in MODELS}


def config_of(checkpoints: Mapping[str, Path], port: int, more: Mapping[str, Any]) -> dict[str, Any]:
    """Both models with half of the budget each."""
    pools = [
        {"role": role, "num_replicas": 2, "num_cpus": 0.1, "min_replicas": 1, "max_replicas": BUDGET - 1}
        for role in ("prefill", "decode")
    ]
    targets = {"ttft_s": TARGETS.ttft_s, "tpot_s": TARGETS.tpot_s}
    models = [
        {
            "name": m,
            "path": str(checkpoints[m]),
            "pools": pools,
            "engine": ENGINE,
            "targets": targets,
            "switch_roles": True,
        }
        for m in MODELS
    ]
    base = {
        "models": models,
        "scaling": {"budget": BUDGET * 0.1, "smoothing_s": 8, "settle_s": 12, "down_delay_s": 25, "memory_s": 30},
        "router": {"max_waiting": 1000, "interactive_wait_s": TIMEOUT_S / 2},  # what cannot run yet, waits
        "api": {"port": port, "decode_processes": 0, "playground": False},
    }
    return overlaid(base, more)


async def watch(port: int, recorder: Recorder, end_s: float) -> None:
    """A look each second."""
    start_s = time.perf_counter()
    number = 0
    while (at_s := time.perf_counter() - start_s) < end_s:
        with suppress(OSError):  # busy: the next look tells
            recorder.note(at_s, Fleet.of(await asyncio.to_thread(call, port, "/admin/status")))
        number += 1
        await asyncio.sleep(max(0.0, start_s + number - time.perf_counter()))


async def rehearse(port: int, jobs: list[Job], seconds: float) -> tuple[Recorder, list[Seen]]:
    recorder = Recorder(jobs)
    _, seen = await asyncio.gather(watch(port, recorder, seconds), play(jobs, port, TIMEOUT_S, recorder.ended))
    return recorder, seen


def faults(seconds: Sequence[Second], seen: Sequence[Seen]) -> list[str]:
    """What must not happen."""
    found = []
    bad = [s for s in seen if not s.is_whole]
    if bad:
        found.append(
            f"{len(bad)} of {len(seen)} requests failed; the first, at {bad[0].due_s:.0f} s: {bad[0].status} {bad[0].error}"
        )
    found += [
        f"at {s.at_s:.0f} s {s.fleet.used:g} {s.fleet.budget_unit} were in use, the budget is {s.fleet.budget:g}"
        for s in seconds
        if s.fleet.used > s.fleet.budget + 1e-6
    ]
    return found


def rows_of(seconds: Sequence[Second]) -> list[dict[str, object]]:
    """As CSV: one row per second, columns by model."""
    rows = []
    for s in seconds:
        row: dict[str, object] = {"at_s": round(s.at_s, 2), "used": s.fleet.used, "budget": s.fleet.budget}
        for i, model in enumerate(MODELS):
            row |= {f"{model}.{role}": s.fleet.doing(model, role) for role in ROLES}
            row |= {
                f"{model}.{phase}": s.fleet.in_phase(model, phase) for phase in ("starting", "switching", "draining")
            }
            ttft_s = s.ttft_p90_s[i]
            row |= {
                f"{model}.offered": s.offered[i],
                f"{model}.finished": s.finished[i],
                f"{model}.refused": s.refused[i],
                f"{model}.failed": s.failed[i],
                f"{model}.ttft_p90_s": "" if ttft_s is None else round(ttft_s, 3),
            }
        rows.append(row)
    return rows


def panels_of(seconds: Sequence[Second]) -> list[Panel]:
    """Replicas by role of each model, then load and TTFT of both."""
    panels = []
    for model in MODELS:
        areas = [Series(r, COLORS[r], [s.fleet.doing(model, r) for s in seconds]) for r in ROLES]
        areas += [Series(p, COLORS[p], [s.fleet.in_phase(model, p) for s in seconds]) for p in ("starting", "draining")]
        panels.append(Panel(f"{model}: replicas", "", [a for a in areas if any(a.values)]))
    colors = ("#0a58ca", "#fd7e14")
    offered = [
        Series(m, c, smooth([s.offered[i] for s in seconds]))
        for i, (m, c) in enumerate(zip(MODELS, colors, strict=True))
    ]
    ttft = [
        Series(m, c, [s.ttft_p90_s[i] for s in seconds]) for i, (m, c) in enumerate(zip(MODELS, colors, strict=True))
    ]
    return [*panels, Panel("requests per second", "", lines=offered), Panel("time to first token", "s", lines=ttft)]


def smooth(values: Sequence[float], width: int = 5) -> list[float | None]:
    """Means over `width` neighbours."""
    half = width // 2
    return [sum(part) / len(part) for part in (values[max(0, i - half) : i + half + 1] for i in range(len(values)))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scaling", type=Path, metavar="FILE")
    parser.add_argument("--calm", type=float, default=60.0, help="seconds between the bursts")
    parser.add_argument("--burst", type=float, default=60.0, help="seconds of each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--csv", type=Path, metavar="FILE")
    parser.add_argument("--svg", type=Path, metavar="FILE")
    args = parser.parse_args()
    more = yaml.safe_load(args.scaling.read_text()) if args.scaling else {}
    phases = phases_of(args.calm, args.burst)
    seconds = sum(p.seconds for p in phases[MODELS[0]])
    jobs = merged(*(list(jobs_of(phases[m], args.seed + i)) for i, m in enumerate(MODELS)))
    with tempfile.TemporaryDirectory(prefix="two-models-") as name:
        folder = Path(name)
        checkpoints = {m: write_tiny_checkpoint(folder / m, seed=i) for i, m in enumerate(MODELS)}
        with serving(config_of(checkpoints, free_port(), more), folder) as port:
            recorder, seen = asyncio.run(rehearse(port, jobs, seconds))
    rows = rows_of(recorder.seconds)
    if args.csv:
        with args.csv.open("w", newline="") as out:
            table = csv.DictWriter(out, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    if args.svg:
        half = args.calm / 2
        shades = [(half, half + args.burst, "burst on the first")]
        shades.append((half + args.burst + args.calm, half + 2 * args.burst + args.calm, "burst on the second"))
        args.svg.parent.mkdir(parents=True, exist_ok=True)
        args.svg.write_text(drawn([s.at_s for s in recorder.seconds], panels_of(recorder.seconds), shades))
    for model in MODELS:
        mine = [s for s in seen if s.model == model]
        print(
            f"{model:>8}: {sum(s.is_whole for s in mine)} of {len(mine)} answered, TTFT p90 "
            f"{p90([s.ttft_s for s in mine if s.is_whole]):.2f} s"
        )
    print(f"the client lagged by {1000 * lag_s(seen):.0f} ms at most in 99 of 100 requests")
    found = faults(recorder.seconds, seen)
    print(*found, sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
