"""`ernie-cluster undrain`: a replica that was drained takes work again."""

from __future__ import annotations

import argparse

from ernie_cluster.api.operator import Order
from ernie_cluster.cli.operate import Cluster, add_replica_argument, add_server_arguments, connect, find_replica

_EXAMPLES = """\
examples:
  ernie-cluster undrain abc123                  the last part of an id is enough, or its beginning

`ernie-cluster status` shows the ids.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EXAMPLES
    add_replica_argument(parser)
    add_server_arguments(parser)


def main(args: argparse.Namespace) -> int:
    return run(connect(args), args.replica)


def run(cluster: Cluster, given: str) -> int:
    """Give a replica work again; the exit code."""
    replica = find_replica(given, cluster.view()).replica
    view = cluster.order(Order(replica, "undrain"))
    print(f"{replica} is {view.phase}, as {view.role}")
    return 0
