"""`ernie-cluster status`: what the models and replicas of a running server do, once or live."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from ernie_cluster.api.views import readable
from ernie_cluster.cli.operate import Cluster, Unreachable, add_server_arguments, connect, seconds
from ernie_cluster.cli.status_view import ROWS_PER_POOL, render

_EXAMPLES = f"""\
examples:
  ernie-cluster status
  ernie-cluster status --watch                  redrawn every 2 s until Ctrl-C; on a terminal only
  ernie-cluster status --all                    every replica, not only {ROWS_PER_POOL} of a pool
  ernie-cluster status --json                   for programs: ClusterView, as GET /admin/status tells it
  ERNIE_ADMIN_KEY=sk-ernie-... ernie-cluster status --url https://models.example

TTFT and TPOT are measured: nine of ten requests lately had to wait less for their first token, and for each further one.
run and wait count requests, tokens those of prompts that are not computed yet, and the last age is since a replica told of
itself. "has 1 of 2.3 prefill" compares the replicas that take such work with what the autoscaler finds needed.
"""

DEFAULT_WATCH_S = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EXAMPLES
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--watch",
        metavar="SECONDS",
        type=seconds,
        nargs="?",
        const=DEFAULT_WATCH_S,
        help=f"look again and again, so often (default {DEFAULT_WATCH_S:g})",
    )
    how.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--all", action="store_true", help="show every replica")
    add_server_arguments(parser)


def main(args: argparse.Namespace) -> int:
    cluster = connect(args)
    if args.json:
        print(readable(cluster.view()))
        return 0
    console, rows = Console(highlight=False), None if args.all else ROWS_PER_POOL
    if args.watch is None or not console.is_terminal:
        console.print(render(cluster.view(), time.time(), rows_per_pool=rows))
        return 0
    return watch(cluster, console, args.watch, rows)


def watch(
    cluster: Cluster,
    console: Console,
    interval_s: float,
    rows_per_pool: int | None,
    *,
    clock: Callable[[], float] = time.time,
    pause: Callable[[float], None] = time.sleep,
) -> int:
    """Show how things are until interrupted; the exit code. A server that is away for a while is waited for.

    Args:
        interval_s: between two looks.
        rows_per_pool: see `render`.
        clock: Unix time.
        pause: waits so many seconds.

    Raises:
        ErnieClusterError: the server is not there from the start, or refuses.
    """
    shown: RenderableType = render(cluster.view(), clock(), rows_per_pool=rows_per_pool)
    try:
        with Live(shown, console=console, auto_refresh=False, screen=True) as live:
            while True:
                pause(interval_s)
                try:
                    shown = render(cluster.view(), clock(), rows_per_pool=rows_per_pool)
                    live.update(shown, refresh=True)
                except Unreachable as e:
                    live.update(Group(Text(f"not up to date: {e}", style="bold red"), shown), refresh=True)
    except KeyboardInterrupt:
        return 0
