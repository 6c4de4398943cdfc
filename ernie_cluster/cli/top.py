"""`ernie-cluster top`: what a running server does at present, pool by pool and replica by replica, interval by interval."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from ernie_cluster.api.views import readable
from ernie_cluster.cli.operate import Cluster, Unreachable, add_server_arguments, connect, seconds
from ernie_cluster.cli.remote import printable
from ernie_cluster.cli.top_draw import NUM_REPLICAS, render
from ernie_cluster.cli.top_view import SORTS, Look, top
from ernie_cluster.errors import ErnieClusterError
from ernie_cluster.observe.reading import Reading, read

_EXAMPLES = f"""\
examples:
  ernie-cluster top                             every 2 s until Ctrl-C; into a pipe one table after the other
  ernie-cluster top --interval 10 --sort kv     averages of 10 s, replicas with the fullest KV cache first
  ernie-cluster top --once                      one interval, then done
  ernie-cluster top --json                      likewise, for programs
  ERNIE_ADMIN_KEY=sk-ernie-... ernie-cluster top --url https://models.example

Rates, and quantiles of TTFT and ITL, are of the interval alone: differences of what /metrics counts, guessed within its
buckets. Requests count when they end. Of several API replicas all that answer are added up. The replicas are the
{NUM_REPLICAS} busiest (--num, --sort); tokens are those of prompts that are not computed yet. `ernie-cluster status` shows what the
autoscaler decided.
"""

DEFAULT_INTERVAL_S = 2.0
_MAX_PROCESSES = 8
"""Of the API, that one look asks for at most."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "--interval",
        metavar="SECONDS",
        type=seconds,
        default=DEFAULT_INTERVAL_S,
        help=f"between two looks, so what rates are averages of (default {DEFAULT_INTERVAL_S:g})",
    )
    parser.add_argument("--once", action="store_true", help="show one interval and end")
    parser.add_argument("--json", action="store_true", help="print one interval as JSON and end")
    parser.add_argument("--sort", choices=list(SORTS), default="running", help="whose replicas come first")
    parser.add_argument(
        "--num", metavar="N", type=_count, default=NUM_REPLICAS, help=f"replicas to show (default {NUM_REPLICAS})"
    )
    add_server_arguments(parser)


def main(args: argparse.Namespace) -> int:
    cluster = connect(args)
    if args.json:
        before = look(cluster, time.monotonic)
        time.sleep(args.interval)
        print(readable(top(before, look(cluster, time.monotonic), sort=args.sort)))
        return 0
    return watch(cluster, Console(highlight=False), args.interval, args.sort, args.num, is_once=args.once)


def look(cluster: Cluster, clock: Callable[[], float]) -> Look:
    """The cluster now, and what each process of the API that answers has counted; raises as `Cluster.view` does.

    Behind a balancer each question may go to another process, so it asks again until one has answered before.
    """
    view = cluster.view()
    found: dict[float, tuple[float, Reading]] = {}
    for _ in range(_MAX_PROCESSES):
        try:
            reading = read(cluster.metrics())
        except ValueError as e:
            raise ErnieClusterError(f"{cluster.url}/metrics is no text of Prometheus' ({printable(str(e))})") from None
        if reading.process in found:
            break
        found[reading.process] = clock(), reading
    return Look(view, found)


def watch(
    cluster: Cluster,
    console: Console,
    interval_s: float,
    sort: str,
    num_replicas: int,
    *,
    is_once: bool = False,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> int:
    """Show interval after interval until interrupted; the exit code. A server that is away for a while is waited for.

    A terminal is redrawn in place; one that cannot, or a pipe, gets one table after the other.

    Args:
        interval_s: between two looks.
        sort: see `top`.
        num_replicas: see `render`.
        is_once: end after the first interval.
        clock: monotonic seconds.
        pause: waits so many seconds.

    Raises:
        ErnieClusterError: the server is not there from the start, or refuses.
    """
    before = look(cluster, clock)
    is_live = console.is_terminal and not console.is_dumb_terminal and not is_once
    shown: RenderableType = Text(f"the first {interval_s:g} s are being counted")
    with Live(shown, console=console, auto_refresh=False, screen=True) if is_live else nullcontext() as live:
        try:
            for _ in _times(is_once):
                pause(interval_s)
                try:
                    after = look(cluster, clock)
                    shown = render(top(before, after, sort=sort), num_replicas=num_replicas)
                    before, page = after, shown
                except Unreachable as e:
                    if is_once:
                        raise
                    page = Group(Text(f"not up to date: {e}", style="bold red"), shown)
                if live is not None:
                    live.update(page, refresh=True)
                else:
                    console.print(page, Text())
        except KeyboardInterrupt:
            pass
    return 0


def _times(is_once: bool) -> Iterator[int]:
    return iter(range(1)) if is_once else itertools.count()


def _count(text: str) -> int:
    """Value of --num; raises ArgumentTypeError."""
    if not (text.isascii() and text.isdigit() and len(text) < 7):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 999999")
    return int(text)
