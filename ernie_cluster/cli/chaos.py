"""`ernie-cluster chaos`: faults on purpose under load, and whether anybody would have noticed."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import httpx

from ernie_cluster.api.operator import ClusterView
from ernie_cluster.chaos.blows import AtPoint
from ernie_cluster.chaos.experiment import Experiment, Plan
from ernie_cluster.chaos.prompts import Prompt, make_prompts
from ernie_cluster.chaos.report import Report
from ernie_cluster.chaos.stages import SHAPES, endless, possible
from ernie_cluster.chaos.stream import Outcome, ask
from ernie_cluster.cli.operate import Cluster, add_server_arguments, connect
from ernie_cluster.cli.progress import Progress
from ernie_cluster.cli.remote import add_key_argument, key_headers, trust
from ernie_cluster.config.faults import POINTS
from ernie_cluster.errors import ConfigError, ErnieClusterError

ROLES = ("vision", "prefill", "decode", "mixed", "router", "api")
DEFAULT_ROLES = ROLES[:-1]
_MAX_TOKENS = 64
_MAX_CLIENTS = 256
_MAX_ANSWER = 4096
_HUNG_S = 120.0
"""A request without an end by then has hung; the longest recovery is shorter."""

_EPILOG = """\
For staging: processes are killed and stopped for real. The server must have been started with

  faults: {enabled: true}

in its configuration, and its admin key opens this too. What happens:

  1. Calm. All clients ask every prompt, again and again: greedy, seeded and JSON-schema prompts, with
     pictures where the model takes them. Each has one right answer, since a request is a value here.
  2. Faults, one after another in an order that --seed fixes, each at a stage of its own: before, mid-encode,
     mid-prefill, mid-transfer, mid-decode. Between two of them everything has to be whole again.
  3. Calm. Then KV blocks, leases, promises and replicas must be back at the count of the beginning within 10 s.

Exit code 1 when a request was lost (an error, or a silent end), wrong (another answer than in calm) or hung, when
something was not given back, or when the system did not get whole again; 0 otherwise. 429 and 503 are waited out, as
clients do. In bf16 a near tie may fall otherwise in another batch: prompts whose calm answers differ are not judged.
API processes are struck only when --pools names api: their own connections break then, and are made again.

examples:
  ernie-cluster chaos                                     a minute of everything
  ernie-cluster chaos --for 5m --only kill,stop --pools decode,prefill
  ernie-cluster chaos --only corrupt --seed 7 --json found.json
  ernie-cluster chaos --list                              where faults can strike, for `faults.points` and /admin/faults
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument(
        "--for", dest="for_s", metavar="TIME", type=_duration, default=60.0, help="how long faults go on (default 60s)"
    )
    parser.add_argument(
        "--calm", metavar="TIME", type=_duration, default=10.0, help="of load before and after (default 10s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of prompts, order and victims (default 0)")
    parser.add_argument(
        "--only",
        metavar="ACTIONS",
        type=_list_of(SHAPES),
        default=list(SHAPES),
        help=f"of {','.join(SHAPES)} (default all)",
    )
    parser.add_argument(
        "--pools",
        metavar="KINDS",
        type=_list_of(ROLES),
        default=list(DEFAULT_ROLES),
        help=f"of {','.join(ROLES)} (default all but api)",
    )
    parser.add_argument(
        "--clients", type=partial(_whole, high=_MAX_CLIENTS), default=4, help="requests at the same time (default 4)"
    )
    parser.add_argument(
        "--max-tokens",
        type=partial(_whole, high=_MAX_ANSWER),
        default=_MAX_TOKENS,
        help="of one answer (default %(default)s)",
    )
    parser.add_argument("--model", help="served model name (default: the first)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was found")
    parser.add_argument("--list", action="store_true", help="show the points where faults can strike, and nothing else")
    add_key_argument(parser)
    add_server_arguments(parser)


def main(args: argparse.Namespace) -> int:
    if args.list:
        print(
            "\n".join(
                f"{name.ljust(22)} {point.meaning}\n{' ' * 22} {', '.join(point.actions)}"
                for name, point in POINTS.items()
            )
        )
        return 0
    cluster = connect(args)
    if args.json is not None and not args.json.resolve().parent.is_dir():
        raise ConfigError(f"--json {args.json}: there is no such folder")
    report = asyncio.run(_run(args, cluster))
    print(report.text())
    if args.json is not None:
        args.json.write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    return 1 if report.objections else 0


async def _run(args: argparse.Namespace, cluster: Cluster) -> Report:
    view = await asyncio.to_thread(cluster.view)
    model = _model(view, args.model)
    homes = {r.home for r in view.replicas if r.model == model}
    wounds = possible(homes.union(("router", "api")) & set(args.pools), args.only)
    if not wounds:
        raise ErnieClusterError(
            f"{model} has {', '.join(sorted(homes))} replicas, and none of {', '.join(args.only)} can strike "
            f"{', '.join(args.pools)}; see --list"
        )
    plan = Plan(model, args.seed, args.clients, args.calm, args.for_s, args.calm, "api" in args.pools)
    prompts = make_prompts(model, args.seed, has_eyes="vision" in homes, max_tokens=args.max_tokens)
    headers = key_headers(args.api_key)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(verify=trust(args.ca_file), limits=limits) as client:

        async def once(prompt: Prompt) -> Outcome:
            return await ask(client, cluster.url, prompt, _HUNG_S, headers)

        volleys = ([AtPoint(wound)] for wound in endless(wounds, args.seed))
        return await Experiment(cluster, once, prompts, volleys, plan, Progress()).run()


def _model(view: ClusterView, wish: str | None) -> str:
    ready = [m.name for m in view.models if m.is_ready]
    if wish is not None and wish not in ready:
        raise ErnieClusterError(f"model {wish!r} is not ready there; ready: {', '.join(ready) or 'none'}")
    if not ready:
        raise ErnieClusterError("no model is ready there")
    return wish or ready[0]


def _duration(text: str) -> float:
    number, unit = text.rstrip("smh"), text[len(text.rstrip("smh")) :]
    try:
        value = float(number) * {"": 1, "s": 1, "m": 60, "h": 3600}[unit]
    except (ValueError, KeyError):
        value = 0.0
    if not 0 < value <= 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is no time such as 60s or 5m, a day at most")
    return value


def _list_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Of an option that takes some of these, with commas between."""
    names = tuple(known)

    def read(text: str) -> list[str]:
        found = [name.strip() for name in text.split(",")]
        unknown = [name for name in found if name not in names]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(names)}")
        return found

    return read


def _whole(text: str, high: int) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= high:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to {high}")
    return int(text)
