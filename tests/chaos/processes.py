"""The processes of a running application, found by the titles that Ray gives them: to be struck, and to be weighed."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ernie_cluster.chaos.blows import Hit, Scene
from tests.chaos.sockets import Sockets, sockets
from tests.e2e.processes import Process, descendants, shared_memory_of

TITLES = {
    "conductor of decode": "ray::ServeReplica:ernie:tiny-decode",
    "conductor of prefill": "ray::ServeReplica:ernie:tiny-prefill",
    "conductor of vision": "ray::ServeReplica:ernie:tiny-vision",
    "API process": "ray::ServeReplica:ernie:api",
    "controller of Serve": "ray::ServeController",
    "router": "ray::Router",
}
"""Kind -> how its process calls itself."""

STOP_S = 4.0

MEMORY = "memfd:ernie-kv"
CHANNEL_KINDS = ("/memfd:ernie-kv (deleted)", "socket", "anon_inode:[eventfd]")
"""What a channel has open at either end."""


def ours() -> set[Process]:
    """All processes that this one has started, and theirs."""
    return descendants(os.getpid())


def of_kind(kind: str) -> list[Process]:
    return sorted((p for p in ours() if p.name.startswith(TITLES[kind])), key=lambda p: p.pid)


@dataclass(frozen=True)
class Signal:
    """A blow from outside: SIGKILL, or SIGSTOP for a while."""

    kind: str
    number: signal.Signals

    @property
    def name(self) -> str:
        return f"{self.number.name} {self.kind}"

    async def strike(self, scene: Scene) -> Hit | None:
        found = of_kind(self.kind)
        if not found:
            return None
        chosen = scene.chance.choice(found)
        os.kill(chosen.pid, self.number)
        if self.number == signal.SIGSTOP:
            try:
                await asyncio.sleep(STOP_S)
            finally:  # what follows is to find it at work
                _go_on(chosen)
        return Hit(f"{self.kind}, pid {chosen.pid}", True, False)


def _go_on(process: Process) -> None:
    if process.is_alive:
        os.kill(process.pid, signal.SIGCONT)


@dataclass(frozen=True)
class Footprint:
    """What processes hold of the machine."""

    actors: Counter[str]
    """Processes of actors, by title."""
    files: dict[Process, Counter[str]]
    """Open descriptors by kind, without those of channels: pairs of replicas join when they first meet, in calm or later."""
    sockets: Sockets
    """TCP, which `files` leaves out."""
    widows: int
    """Anonymous shared memory of channels that one process alone still has: its peer is gone, and it has not noticed."""
    named: frozenset[str]
    """Mapped names in /dev/shm."""

    def objection(self, calm: Footprint) -> str:
        """What is there beyond the calm count, of processes that live on; "" if nothing is."""
        titles = self.actors.keys() | calm.actors.keys()
        found = [
            f"{self.actors[t]} x {t} (calm: {calm.actors[t]})"
            for t in sorted(titles)
            if self.actors[t] != calm.actors[t]
        ]
        for p in self.files.keys() & calm.files.keys():
            if self.files[p].total() > calm.files[p].total():
                more = ", ".join(f"{n} {kind}" for kind, n in (self.files[p] - calm.files[p]).items())
                found.append(f"{p.name.strip()} {p.pid} has more files open: {more}")
        if about_sockets := self.sockets.objection(calm.sockets):
            found.append(about_sockets)
        if self.widows > calm.widows:
            found.append(f"{self.widows} pieces of shared memory whose other side is gone (calm: {calm.widows})")
        return "; ".join(found + [f"{name} in /dev/shm" for name in self.named - calm.named])


def footprint() -> Footprint:
    """Of the application now."""
    processes = {p for p in ours() if p.name.startswith("ray::") and not p.name.startswith("ray::IDLE")}
    links = {p: _links(p.pid) for p in processes}
    opened = {p: frozenset(inode for link, inode in own if link.startswith("socket")) for p, own in links.items()}
    tcp = sockets(opened)
    memories = {p: {inode for link, inode in own if MEMORY in link} for p, own in links.items()}
    holders = Counter(inode for own in memories.values() for inode in own)
    return Footprint(
        Counter(p.name.partition(".")[0].strip() for p in processes),
        {
            p: _others([link for link, i in links[p] if i not in opened[p] & tcp.inodes], len(memories[p]))
            for p in processes
        },
        tcp,
        sum(n == 1 for n in holders.values()),
        frozenset(shared_memory_of(processes)),
    )


def _others(links: list[str], num_channels: int) -> Counter[str]:
    """Descriptors by kind, without those of channels."""
    kinds = Counter(link if link.startswith("anon_inode") else link.partition(":[")[0] for link in links)
    kinds.subtract(dict.fromkeys(CHANNEL_KINDS, num_channels))
    return kinds


def _links(pid: int) -> list[tuple[str, int]]:
    """(what it leads to, inode) of each descriptor."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            found.append((os.readlink(entry), entry.stat().st_ino))
        except OSError:
            continue
    return found
