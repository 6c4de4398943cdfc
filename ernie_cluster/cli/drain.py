"""`ernie-cluster drain`: a replica finishes what it has and takes no more."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

from ernie_cluster.api.operator import Order
from ernie_cluster.cli.operate import (
    Cluster,
    Unreachable,
    add_replica_argument,
    add_server_arguments,
    connect,
    find_replica,
    seconds,
    seconds_or_zero,
    work_of,
)
from ernie_cluster.cli.progress import Progress
from ernie_cluster.errors import ErnieClusterError

_EXAMPLES = """\
examples:
  ernie-cluster drain abc123                    the last part of an id is enough, or its beginning
  ernie-cluster drain m/decode/abc123 --wait    return when it has nothing left: 0, or 1 when it takes longer than 300 s
  ernie-cluster drain abc123 --wait 3600 --url http://10.0.0.1:8000 --admin-key sk-ernie-...
  ernie-cluster drain abc123 --within 30 --wait others go on after 30 s with what it has not finished by then
  ernie-cluster drain abc123 --within 0         at once: no answer breaks off, it goes on elsewhere
  ernie-cluster undrain abc123

`ernie-cluster status` shows the ids.
"""

DEFAULT_WAIT_S = 300.0
PAUSE_S = 1.0
"""Between two looks; replicas at rest tell of themselves once a second."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EXAMPLES
    add_replica_argument(parser)
    parser.add_argument(
        "--within",
        metavar="SECONDS",
        type=seconds_or_zero,
        help="after so long others go on with what it still has; 0 = at once (default: the server's router.drain_timeout_s)",
    )
    parser.add_argument(
        "--wait",
        metavar="SECONDS",
        type=seconds,
        nargs="?",
        const=DEFAULT_WAIT_S,
        help=f"wait until it has nothing left, so long at most (default {DEFAULT_WAIT_S:g})",
    )
    add_server_arguments(parser)


def main(args: argparse.Namespace) -> int:
    return run(connect(args), args.replica, args.wait, within_s=args.within)


def run(
    cluster: Cluster,
    given: str,
    wait_s: float | None = None,
    *,
    within_s: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> int:
    """Drain a replica; the exit code, 1 when it still has work after `wait_s`.

    Args:
        given: see `find_replica`.
        wait_s: seconds to wait until it has nothing left; None waits for nothing.
        within_s: see `Order`.
        clock: seconds from any start.
        pause: waits so many seconds.
    """
    replica = find_replica(given, cluster.view()).replica
    ordered_s = clock()
    view = cluster.order(Order(replica, "drain", within_s=within_s))
    print(f"{replica} is {view.phase}: {work_of(view)}")
    return 0 if wait_s is None else _wait(cluster, replica, wait_s, ordered_s, clock, pause)


def _wait(
    cluster: Cluster,
    replica: str,
    wait_s: float,
    ordered_s: float,
    clock: Callable[[], float],
    pause: Callable[[float], None],
) -> int:
    say, said = Progress(), ""
    while True:
        try:
            found = [r for r in cluster.view().replicas if r.replica == replica]
        except Unreachable as e:
            words = str(e)
        else:
            if not found:
                print(f"{replica} is gone")
                return 0
            (view,) = found
            if view.phase != "draining":
                raise ErnieClusterError(f"{replica} is {view.phase} now: somebody else has given it another order")
            is_fresh = view.age_s < clock() - ordered_s  # what it told before the order does not count
            if is_fresh and not (view.num_running or view.num_waiting or view.waiting_tokens):
                print(f"{replica} has nothing left")
                return 0
            words = work_of(view)
        if words != said:
            say(words)
            said = words
        if clock() - ordered_s >= wait_s:
            print(f"{replica} is not done after {wait_s:g} s: {words}; it goes on, and takes no more")
            return 1
        pause(PAUSE_S)
