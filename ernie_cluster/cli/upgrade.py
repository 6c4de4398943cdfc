"""`ernie-cluster upgrade`: the replicas of a pool are replaced one by one, each when the one before is there again."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

from ernie_cluster.api.operator import ClusterView, Order, ReplicaView
from ernie_cluster.cli.operate import (
    Cluster,
    Unreachable,
    add_server_arguments,
    connect,
    seconds,
    seconds_or_zero,
    work_of,
)
from ernie_cluster.cli.progress import Progress
from ernie_cluster.errors import ErnieClusterError

_EXAMPLES = """\
examples:
  ernie-cluster upgrade ernie                   all pools of a model, for a new version of the package or of the checkpoint
  ernie-cluster upgrade ernie/decode            one pool
  ernie-cluster upgrade ernie --within 60       answers that take longer go on elsewhere

No GPU more is needed: a replica drains, ends, and another one starts in its place. Where a role has a single replica its
requests wait meanwhile. It stops when a new one does not come, and says how to go on. A change of the configuration needs
none of this: `ernie-cluster serve` or `serve deploy` again does it.
"""

DEFAULT_TIMEOUT_S = 1800.0
PAUSE_S = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EXAMPLES
    parser.add_argument("pool", metavar="POOL", help="a model, or MODEL/ROLE for one of its pools")
    parser.add_argument(
        "--within",
        metavar="SECONDS",
        type=seconds_or_zero,
        help="what a replica has for what it is at; others go on with what is left (default: router.drain_timeout_s)",
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=seconds,
        default=DEFAULT_TIMEOUT_S,
        help=f"give up when a replica is not replaced by then (default {DEFAULT_TIMEOUT_S:g})",
    )
    parser.add_argument("--before", metavar="TIME", type=seconds_or_zero, help=argparse.SUPPRESS)
    add_server_arguments(parser)


def main(args: argparse.Namespace) -> int:
    before_s = time.time() if args.before is None else args.before
    return run(connect(args), args.pool, args.within, args.timeout, before_s)


def run(
    cluster: Cluster,
    pool: str,
    within_s: float | None,
    timeout_s: float,
    before_s: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> int:
    """Replace replicas one by one; the exit code, 1 when one does not come again.

    Args:
        pool: a model, or model and role.
        within_s: see `Order`.
        timeout_s: for each.
        before_s: only those that were started before, Unix time.
        clock: seconds from any start.
        pause: waits so many seconds.

    Raises:
        ErnieClusterError: there is no such pool, or an order is refused.
    """
    view = cluster.view()
    if not _of(view, pool):
        known = sorted({f"{r.model}/{r.home}" for r in view.replicas})
        raise ErnieClusterError(f"there is no pool {pool!r} with a replica; there are: {', '.join(known) or 'none'}")
    old = [r for r in _of(view, pool) if r.started_s < before_s]
    say = Progress()
    for number, replica in enumerate(old, 1):
        num_ready = sum(_is_ready(r) for r in _of(cluster.view(), f"{replica.model}/{replica.home}"))
        if num_ready == 1:
            say(f"{replica.replica} is the only one of its pool: requests wait until its successor is there")
        say(f"{number} of {len(old)}: {replica.replica}")
        cluster.order(Order(replica.replica, "restart", within_s=within_s))
        if not _replaced(cluster, replica, max(1, num_ready), clock() + timeout_s, say, clock, pause):
            print(
                f"{replica.replica} was not replaced within {timeout_s:g} s: {number - 1} of {len(old)} are. When the cause "
                f"is found, go on with: ernie-cluster upgrade {pool} --before {before_s:.0f}"
            )
            return 1
    print(f"{len(old)} of {len(old)} replicas of {pool} are replaced")
    return 0


def _replaced(
    cluster: Cluster,
    replica: ReplicaView,
    wanted: int,
    until_s: float,
    say: Progress,
    clock: Callable[[], float],
    pause: Callable[[float], None],
) -> bool:
    """Wait until a replica is gone and its pool has as many ready ones as before; False when that is late."""
    said = ""
    while clock() < until_s:
        try:
            there = _of(cluster.view(), f"{replica.model}/{replica.home}")
        except Unreachable as e:
            words = str(e)
        else:
            left = [r for r in there if r.replica == replica.replica]
            num_ready = sum(_is_ready(r) for r in there if r not in left)
            if not left and num_ready >= wanted:
                return True
            words = f"it ends: {work_of(left[0])}" if left else f"it is gone; {num_ready} of {wanted} are ready"
        if words != said:
            say(words)
            said = words
        pause(PAUSE_S)
    return False


def _of(view: ClusterView, pool: str) -> list[ReplicaView]:
    """The replicas of a model, or of one of its pools; the longest there first."""
    found = [r for r in view.replicas if pool in (r.model, f"{r.model}/{r.home}")]
    return sorted(found, key=lambda r: (r.home, r.started_s, r.replica))


def _is_ready(replica: ReplicaView) -> bool:
    return replica.phase in ("ready", "switching")
