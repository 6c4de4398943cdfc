"""`ernie-cluster bench`: how fast a server is, and beside another one on request."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from ernie_cluster import __version__
from ernie_cluster.bench import traces
from ernie_cluster.bench.course import plotted
from ernie_cluster.bench.options import above_zero, add_load_arguments, check_length, duration, slo_of, source_of
from ernie_cluster.bench.pace import Closed, Open, Pace, Replay
from ernie_cluster.bench.record import Record
from ernie_cluster.bench.report import Side, lines, to_json
from ernie_cluster.bench.run import Plan, Server, run
from ernie_cluster.bench.scenarios import SCENARIOS, Source
from ernie_cluster.cli.remote import (
    DEFAULT_URL,
    add_ca_argument,
    add_key_argument,
    base_url_of,
    explain,
    first_model_of,
    key_headers,
    printable,
    trust,
)
from ernie_cluster.errors import ConfigError, ErnieClusterError

OTHER_KEY_VARIABLE = "ERNIE_BENCH_VS_API_KEY"
_DEFAULT_REQUESTS = 64
_ROUNDS_BESIDE = 4
_MOST = 1_000_000
_CONNECT_TIMEOUT_S = 5.0
_LAG_S = 0.05
_TELL_S = 5.0

_SCENARIO_LINES = "\n".join(f"  {name.ljust(10)} {mix.summary}" for name, mix in SCENARIOS.items())
_EPILOG = f"""\
scenarios:
{_SCENARIO_LINES}

what the figures say:
  TTFT        request sent to first piece of text: queue, pictures and prompt
  ITL         gap between two pieces of text, many per answer: its p99 is the stutter that users see
  TPOT        (last piece - first) / (tokens - 1), one per answer: how fast an answer is written
  E2E         request sent to the answer's end
  goodput     answers per second that were whole and within --slo-ttft, --slo-tpot and --slo-latency
Durations are those of whole answers, within 1 %; errors are counted by kind.

how to ask:
  --concurrency N   N clients, each asks when it has its answer. Finds the throughput. A slow server is asked less.
  --rate R          R requests per second come at random, whatever became of those before, as users do. Finds the
                    latency at a load; times count from when a request was due.
  --trace T         arrivals and lengths of a real service, --speed N times as fast; --concurrency or --rate with it
                    take only its lengths.
Lengths are drawn, and the same seed asks the same: without --seed each run asks other questions, so that no cache
of the server knows them. Run it on another machine than the server where you can: the client needs a core of its own.

examples:
  ernie-cluster bench                                             {_DEFAULT_REQUESTS} chats, 8 at a time
  ernie-cluster bench --scenario pictures --rate 4 --for 1m --slo-ttft 500ms
  ernie-cluster bench --scenario mixed --concurrency 32 --requests 500 --json out.json --svg out.svg
  ernie-cluster bench --trace azure-chat --speed 0.5 --shrink 4
  ernie-cluster bench --vs http://other:8000 --rounds 6           the same for both in turns, and ratios
  ernie-cluster bench --url https://server/v1 --api-key KEY --plain
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("--url", default=DEFAULT_URL, help="server (default: %(default)s)")
    parser.add_argument("--model", help="served model name (default: the first that the server lists)")
    add_key_argument(parser)
    add_ca_argument(parser)
    parser.add_argument("--vs", metavar="URL", help="another OpenAI-compatible server, to be asked the same in turns")
    parser.add_argument("--vs-model", metavar="MODEL", help="its model (default: the first that it lists)")
    parser.add_argument(
        "--vs-api-key", metavar="KEY", help=f"its key (default: the environment's {OTHER_KEY_VARIABLE})"
    )
    pace = parser.add_mutually_exclusive_group()
    count = partial(_whole, least=1, most=_MOST)
    pace.add_argument("--concurrency", metavar="N", type=count, help="clients (default: 8)")
    pace.add_argument("--rate", metavar="R", type=above_zero, help="requests per second")
    parser.add_argument("--speed", metavar="N", type=above_zero, default=1.0, help="of a trace (default: 1)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--requests", metavar="N", type=count, help=f"per server (default: {_DEFAULT_REQUESTS}, or the whole trace)"
    )
    length.add_argument("--for", dest="for_s", metavar="TIME", type=duration, help="seconds, or 5m; per server")
    parser.add_argument("--rounds", metavar="N", type=count, help=f"turns with --vs (default: {_ROUNDS_BESIDE})")
    add_load_arguments(parser)
    parser.add_argument("--seed", metavar="N", type=partial(_whole, least=0, most=2**31), help="(default: any)")
    parser.add_argument("--timeout", metavar="TIME", type=duration, default=300.0, help="per answer (default: 300s)")
    parser.add_argument(
        "--warm-up", metavar="N", type=partial(_whole, least=0, most=1000), default=2, help="not counted (default: 2)"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures, and what they add up from")
    parser.add_argument("--svg", metavar="FILE", type=Path, help="draw the course of the run against --url")


def main(args: argparse.Namespace) -> int:
    """The `bench` command: 0, or 1 when a server gave no whole answer; 130 when interrupted, with what there was."""
    source = source_of(args)
    for path in (args.json, args.svg):
        if path is not None and not path.resolve().parent.is_dir():
            raise ConfigError(f"{path}: there is no such folder")
    if args.rounds is not None and args.vs is None:
        raise ConfigError("--rounds is for --vs: who else would have a turn?")
    seed = random.SystemRandom().randrange(2**31) if args.seed is None else args.seed
    plan = _plan(args, source, seed)
    servers: list[Server] = []
    is_interrupted = False
    try:
        asyncio.run(_run(args, plan, servers))
    except KeyboardInterrupt:
        is_interrupted = True
    if not servers:
        return 130 if is_interrupted else 1
    sides = [Side(s.url, s.model, s.book.total, s.duration_s, s.examples, s.lag) for s in servers]
    print("", *map(printable, [*_headings(plan, sides), "", *lines(sides), *_warnings(sides)]), sep="\n")
    _write(args, plan, sides, servers[0])
    return 130 if is_interrupted else int(not all(side.tally.num_whole for side in sides))


def _plan(args: argparse.Namespace, source: Source, seed: int) -> Plan:
    pace: Pace
    num_requests = args.requests
    if args.rate is not None:
        pace = Open(args.rate, seed)
    elif args.trace and args.concurrency is None:
        times_s = [arrival.arrived_s for arrival in traces.read(args.trace)]
        pace, num_requests = Replay(times_s, args.speed), min(num_requests or len(times_s), len(times_s))
    else:
        pace = Closed(args.concurrency or 8)
    if num_requests is None and args.for_s is None:
        num_requests = _DEFAULT_REQUESTS
    rounds = args.rounds or (_ROUNDS_BESIDE if args.vs else 1)
    if isinstance(pace, Replay):
        if args.rounds is not None:
            raise ConfigError("--rounds: a trace is played once, from its beginning; leave it out, or add --rate")
        rounds = 1
    return Plan(
        source, pace, slo_of(args), seed, None if args.for_s else num_requests, args.for_s, rounds, args.timeout,
        args.warm_up, args.plain,
    )  # fmt: skip


async def _run(args: argparse.Namespace, plan: Plan, servers: list[Server]) -> None:
    """Fill `servers`; says on standard error what cannot be reached, and leaves it empty."""
    ways = [(args.url, args.model, key_headers(args.api_key))]
    if args.vs:
        ways.append((args.vs, args.vs_model, key_headers(args.vs_api_key, "--vs-api-key", OTHER_KEY_VARIABLE)))
    found: list[Server] = []
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    try:
        for url, model, headers in ways:
            client = httpx.AsyncClient(headers=headers, verify=trust(args.ca_file), limits=limits)
            found.append(Server(base_url_of(url), model or "", client))
            if not await _greet(plan, found[-1]):
                return
        servers += found
        progress = _Progress(plan, len(servers))
        await run(plan, servers, progress.step)
        progress.close()
    finally:
        for server in found:
            await server.client.aclose()


async def _greet(plan: Plan, server: Server) -> bool:
    """Learn the model's name, and whether it can take the load."""
    try:
        listed = await server.client.get(server.url + "/v1/models", timeout=_CONNECT_TIMEOUT_S)
        server.model = server.model or first_model_of(listed)
    except (ErnieClusterError, httpx.HTTPError, httpx.InvalidURL) as e:
        print(explain(e, server.url), file=sys.stderr)
        return False
    check_length(plan.source, _max_model_len(listed, server.model), server.model)
    return True


def _max_model_len(listed: httpx.Response, model: str) -> int | None:
    """What our servers and vLLM's tell with their models."""
    try:
        (card,) = [card for card in listed.json()["data"] if card["id"] == model]
        return int(card["max_model_len"])
    except (ValueError, LookupError, TypeError):
        return None


class _Progress:
    """How far it is, on standard error: rewritten on a terminal, elsewhere a line every few seconds."""

    def __init__(self, plan: Plan, num_servers: int) -> None:
        self._whole = plan.num_requests and plan.num_requests * num_servers
        self._done = self._errors = 0
        self._start_s = self._told_s = time.monotonic()
        self._is_terminal = sys.stderr.isatty()

    def step(self, server: Server, record: Record) -> None:
        self._done += 1
        self._errors += bool(record.error)
        now_s = time.monotonic()
        if now_s - self._told_s < (0.1 if self._is_terminal else _TELL_S):
            return
        self._told_s = now_s
        of = f"/{self._whole:,}" if self._whole else ""
        text = f"{now_s - self._start_s:5.0f} s  {self._done:,}{of} requests, {self._errors:,} errors, at {server.url}"
        text = printable(text)
        print(f"\r\x1b[K{text}" if self._is_terminal else text, end="" if self._is_terminal else "\n", file=sys.stderr, flush=True)  # fmt: skip

    def close(self) -> None:
        if self._is_terminal:
            print("\r\x1b[K", end="", file=sys.stderr)


def _headings(plan: Plan, sides: Sequence[Side]) -> list[str]:
    turns = f" in {plan.num_rounds} turns" if plan.num_rounds > 1 else ""
    told = [f"{plan.source.name}, {plan.pace}{turns}, seed {plan.seed}; SLO: {plan.slo}"]
    names = ("this: ", "other: ") if len(sides) > 1 else ("",)
    told += [f"{name}{s.model} at {s.url}, {s.duration_s:.1f} s" for name, s in zip(names, sides, strict=True)]
    return told


def _warnings(sides: Sequence[Side]) -> list[str]:
    late = max((side.lag.percentile(0.99) or 0.0 for side in sides), default=0.0)
    if late < _LAG_S:
        return []
    return [f"note: this client was late itself ({late * 1e3:,.0f} ms at p99): give it more of a core, or ask less"]


def _write(args: argparse.Namespace, plan: Plan, sides: Sequence[Side], first: Server) -> None:
    try:
        if args.json is not None:
            about: dict[str, Any] = {
                "version": __version__,
                "scenario": args.trace or args.scenario,
                "pace": str(plan.pace),
                "seed": plan.seed,
                "shrink": args.shrink,
                "slo": str(plan.slo),
                "rounds": plan.num_rounds,
            }
            whole = {**about, "servers": [to_json(side) for side in sides]}
            args.json.write_text(json.dumps(whole, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        if args.svg is not None:
            args.svg.write_text(plotted(first.book.seconds), encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"{e.filename}: cannot be written: {e.strerror}") from None


def _whole(text: str, least: int, most: int) -> int:
    if not text.isascii() or not text.isdigit() or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} to {most:,}")
    return int(text)
