"""Who listens where on this machine, from /proc."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ernie_cluster.doctor.facts import Port
from ernie_cluster.doctor.need import Need

RAY_PORTS = {6379: "Ray's head (GCS)", 8265: "Ray's dashboard", 10001: "Ray's client server"}
"""Defaults of `ray start --head`."""
HAPROXY_PORTS = {
    "RAY_SERVE_HAPROXY_METRICS_PORT": (9101, "HAProxy's metrics"),
    "RAY_SERVE_HAPROXY_STATS_PORT": (8404, "HAProxy's statistics"),
}
"""Variable that moves a side port of Serve's proxy -> its default, and what it is."""

_LISTENS = "0A"


def ports(need: Need) -> tuple[Port, ...]:
    """Those of the API, of Ray and of Serve's proxy."""
    wanted = need.ports | RAY_PORTS
    for variable, (default, what) in HAPROXY_PORTS.items():
        moved = os.environ.get(variable, "")
        wanted[int(moved) if moved.isdigit() else default] = what
    listening: dict[int, set[str]] = {}
    for name in ("tcp", "tcp6"):
        with suppress(OSError):  # a machine without IPv6
            for port, inode in sockets_of(Path("/proc/net", name).read_text(encoding="utf-8")):
                listening.setdefault(port, set()).add(inode)
    sought = {inode for number in wanted for inode in listening.get(number, ())}
    holders = _holders(sought) if sought else {}
    return tuple(
        Port(number, what, _named(holders[i] for i in listening[number] if i in holders) if number in listening else "")
        for number, what in wanted.items()
    )


def sockets_of(text: str) -> list[tuple[int, str]]:
    """(port, inode) of what listens, from /proc/net/tcp."""
    rows = (line.split() for line in text.splitlines()[1:])
    return [(int(row[1].rpartition(":")[2], 16), row[9]) for row in rows if len(row) > 9 and row[3] == _LISTENS]


def _named(holders: Iterable[str]) -> str:
    return next(iter(sorted(holders)), "a process of another user")


def _holders(inodes: set[str]) -> dict[str, str]:
    """inode -> program and process number, of those that may be looked at."""
    found: dict[str, str] = {}
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        with suppress(OSError):  # gone meanwhile, or not ours to see
            for file in os.scandir(process / "fd"):
                match = re.fullmatch(r"socket:\[(\d+)\]", _target(file.path))
                if match and match[1] in inodes:
                    name = (process / "comm").read_text(encoding="utf-8", errors="replace").strip()
                    found[match[1]] = f"{name} (pid {process.name})"
    return found


def _target(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
