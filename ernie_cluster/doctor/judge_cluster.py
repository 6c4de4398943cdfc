"""What to think of a Ray cluster's nodes, their clocks and the ways between them: pure."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from ernie_cluster.doctor.facts import Clock, Link, Node
from ernie_cluster.doctor.finding import Finding, Level
from ernie_cluster.doctor.need import Need

CLOCK_WARNING_S = 0.2
"""Timelines of a request put spans of several nodes side by side."""
CLOCK_PROBLEM_S = 5.0
"""`upgrade` tells old replicas from new ones by when they started; certificates and tokens have their times, too."""
SLOW_ROUND_TRIP_S = 0.002
"""Between machines of one data centre it takes a tenth of that."""
SLOW_BYTES_PER_S = 0.4e9
"""Of an Ethernet of 10 Gbit/s with room for others; KV of a prompt of 8,000 tokens takes seconds on less."""
SLOW_NCCL_BYTES_PER_S = 2e9
"""Adapters with RDMA reach ten times as much."""
MOST_FOR_ALL_PAIRS = 6
"""Nodes; of more each is tried with its neighbour only, as in a ring."""


def pairs_of(nodes: Sequence[str]) -> list[tuple[str, str]]:
    """Which ways are tried: all, or a ring where that would be many.

    a, b, c give ab, ac, bc. Of seven there are seven: ab, bc, ... ga.
    """
    if len(nodes) <= MOST_FOR_ALL_PAIRS:
        return list(itertools.combinations(nodes, 2))
    return list(zip(nodes, [*nodes[1:], nodes[0]], strict=True))


def nodes(need: Need, facts: Sequence[Node]) -> Iterator[Finding]:
    for node in facts:
        if node.error:
            remedy = "install ernie-cluster there in the version that is here, in the Python that started Ray"
            yield Finding("nodes", "problem", node.error, "runs a task of ours", remedy, node.name)
        else:
            yield Finding("nodes", "ok", f"runs tasks, {node.num_gpus:g} GPUs for Ray", node=node.name)
    total = sum(node.num_gpus for node in facts)
    if need.num_gpus > total:
        remedy = "start Ray on more machines, with --num-gpus where it sees none; until then replicas wait"
        yield Finding("nodes", "problem", f"{total:g} GPUs for Ray in all", f"{need.num_gpus:g}", remedy)


def labels(need: Need, facts: Sequence[tuple[str, tuple[str, ...]]]) -> Iterator[Finding]:
    """Who wants labels that no node has."""
    for whose, wanted in facts:
        remedy = "`ray start --labels`, or change node_labels; until then it waits for such a node"
        yield Finding("labels", "problem", f"no node has {', '.join(wanted)}", f"wanted by {whose}", remedy)
    if not facts:
        seen = "no CONFIG was given" if need.config is None else "every pool has a node with its labels"
        yield Finding("labels", "skipped" if need.config is None else "ok", seen)


def clocks(need: Need, facts: Sequence[Clock]) -> Iterator[Finding]:
    for clock in facts:
        off = max(0.0, abs(clock.ahead_s) - clock.error_s)
        seen = f"{clock.ahead_s * 1000:+.0f} ms, within {clock.error_s * 1000:.0f} ms"
        level: Level = "problem" if off > CLOCK_PROBLEM_S else "warning" if off > CLOCK_WARNING_S else "ok"
        remedy = "" if level == "ok" else "run chrony or another NTP client on every node"
        yield Finding("clocks", level, seen, f"within {CLOCK_WARNING_S:g} s", remedy, clock.node)


def links(need: Need, facts: Sequence[Link]) -> Iterator[Finding]:
    """Plain TCP between processes of two nodes, on ports that the system hands out, as Ray's workers have them."""
    if not facts:
        yield Finding("links", "skipped", "one node only, so there is nothing between nodes")
    for link in facts:
        where = f"{link.first} and {link.second}"
        bound = f"under {SLOW_ROUND_TRIP_S * 1000:g} ms, over {_rate(SLOW_BYTES_PER_S)}"
        if link.error:
            remedy = "open all TCP ports between the nodes: Ray's workers and the hand-over take any"
            yield Finding("links", "problem", link.error, bound, remedy, where)
            continue
        seen = f"{link.round_trip_s * 1000:.2f} ms there and back, {_rate(link.bytes_per_s)}"
        is_slow = link.round_trip_s > SLOW_ROUND_TRIP_S or link.bytes_per_s < SLOW_BYTES_PER_S
        remedy = "check that the nodes are in one zone, and by which adapter they reach each other" if is_slow else ""
        yield Finding("links", "warning" if is_slow else "ok", seen, bound, remedy, where)


def nccl_links(need: Need, facts: Sequence[Link]) -> Iterator[Finding]:
    name = "nccl_links"
    if not facts:
        yield Finding(name, "skipped", "fewer than two nodes with GPUs")
    for link in facts:
        where = f"{link.first} and {link.second}"
        seen = f"all-reduce is right, {_rate(link.bytes_per_s)} from GPU to GPU"
        bound = f"over {_rate(SLOW_NCCL_BYTES_PER_S)}"
        if link.untried:
            yield Finding(name, "skipped", link.untried, node=where)
        elif link.error:
            remedy = (
                "NCCL_DEBUG=INFO says more; open all TCP ports between nodes, name the adapter by NCCL_SOCKET_IFNAME"
            )
            yield Finding(name, "problem", link.error, "all-reduce and send", remedy, where)
        elif link.bytes_per_s < SLOW_NCCL_BYTES_PER_S:
            remedy = "NCCL may go by TCP, as NCCL_DEBUG=INFO tells; give the nodes RDMA, or name it by NCCL_IB_HCA"
            yield Finding(name, "warning", seen, bound, remedy, where)
        else:
            yield Finding(name, "ok", seen, bound, node=where)


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.2f} GB/s"
