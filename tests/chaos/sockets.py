"""TCP connections of processes on this machine: who talks to whom, and who holds an end whose other end is gone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.processes import Process

_ESTABLISHED, _LISTEN = 1, 10


@dataclass(frozen=True)
class Sockets:
    """Of some processes."""

    links: Counter[tuple[Process, int]]
    """How often a process has called a port; two processes that meet for the first time make one, in calm or later."""
    broken: Counter[Process]
    """Ends that are neither open at both sides nor waiting for callers."""
    inodes: frozenset[int]
    """Of all that are counted here."""

    def objection(self, calm: Sockets) -> str:
        """A process that calls somebody twice who was enough for it once, or keeps ends that lead nowhere."""
        twice = [
            f"{p.name.strip()} {p.pid} has {n} connections to port {port} (calm: {calm.links[p, port]})"
            for (p, port), n in self.links.items()
            if n > max(1, calm.links[p, port])
        ]
        dead = [
            f"{p.name.strip()} {p.pid} has {n} connections that are over (calm: {calm.broken[p]})"
            for p, n in self.broken.items()
            if n > calm.broken[p]
        ]
        return "; ".join(twice + dead)


def sockets(opened: Mapping[Process, frozenset[int]]) -> Sockets:
    """Of processes with these inodes open."""
    ends = _ends()
    listening = {local for local, _, state in ends.values() if state == _LISTEN}
    links, broken = Counter[tuple[Process, int]](), Counter[Process]()
    for process, inodes in opened.items():
        for local, remote, state in (ends[i] for i in inodes & ends.keys()):
            if state == _ESTABLISHED:
                links[process, remote] += local not in listening
            elif state != _LISTEN:
                broken[process] += 1
    return Sockets(+links, broken, frozenset(ends))


def _ends() -> dict[int, tuple[int, int, int]]:
    """Inode -> own port, the other's port, state."""
    found = {}
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            local, remote = (int(fields[i].rpartition(":")[2], 16) for i in (1, 2))
            found[int(fields[9])] = local, remote, int(fields[3], 16)
    return found
