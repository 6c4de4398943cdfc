"""`ernie-cluster role`: a replica gets another kind of work."""

from __future__ import annotations

import argparse

from ernie_cluster.api.operator import Order, Role
from ernie_cluster.cli.operate import Cluster, add_replica_argument, add_server_arguments, connect, find_replica

_EXAMPLES = """\
examples:
  ernie-cluster role abc123 decode              the last part of an id is enough, or its beginning

It finishes what it has of its former work. An autoscaler that runs may decide otherwise later. `ernie-cluster status` shows
the ids.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EXAMPLES
    add_replica_argument(parser)
    parser.add_argument("role", choices=("prefill", "decode", "mixed"), help="what it gets from now on")
    add_server_arguments(parser)


def main(args: argparse.Namespace) -> int:
    return run(connect(args), args.replica, args.role)


def run(cluster: Cluster, given: str, role: Role) -> int:
    """Give a replica work of `role`; the exit code."""
    replica = find_replica(given, cluster.view()).replica
    view = cluster.order(Order(replica, "role", role))
    print(f"{replica} is {view.phase}, as {view.role}")
    return 0
