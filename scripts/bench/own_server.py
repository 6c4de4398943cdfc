"""A server of our own as its users start it, and what its processes weigh. Reads /proc; Linux only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_START_S = 180.0
_STOP_S = 60.0
_POLL_S = 0.2
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Server:
    """Where it answers; `pid` is None where somebody else has started it."""

    url: str
    pid: int | None = None

    def rss_bytes(self) -> dict[str, int]:
        """Of each of its processes, by its title and number; what several of them share counts in each."""
        if self.pid is None:
            return {}
        return {f"{_title_of(pid)} ({pid})": _rss_of(pid) for pid in [self.pid, *children_of(self.pid)]}


@dataclass
class Weight:
    """What the processes of one kind hold."""

    processes: int = 0
    rss_bytes: int = 0
    files: int = 0
    threads: int = 0


def weights_of(server: Server) -> dict[str, Weight]:
    """All processes of a server, by kind: Ray's actors by their class or deployment, others by their program."""
    found: dict[str, Weight] = {}
    for pid in [server.pid, *children_of(server.pid)] if server.pid is not None else []:
        fields = _stat(pid)
        if not fields:
            continue
        weight = found.setdefault(kind_of(_name_of(pid)), Weight())
        weight.processes += 1
        weight.rss_bytes += _rss_of(pid)
        weight.threads += int(fields[17])
        try:
            weight.files += len(os.listdir(f"/proc/{pid}/fd"))
        except OSError:
            continue
    return found


def kind_of(command: str) -> str:
    """`ray::EngineRank.poll` is EngineRank, `/usr/bin/haproxy -f x` haproxy."""
    first = command.replace("\0", " ").strip().partition(" ")[0]
    if first.startswith("ray::"):
        return first.removeprefix("ray::").partition(".")[0]
    return first.rpartition("/")[2] or "gone"


@contextmanager
def serving(config: Path, port: int, log: Path) -> Iterator[Server]:
    """`ernie-cluster serve` of a file, on this port, until the end of the block.

    Args:
        config: the file.
        port: of its API, whatever the file says.
        log: takes its words.

    Raises:
        RuntimeError: it ended, or was not ready in time; with the end of its log.
    """
    command = [sys.executable, "-m", "ernie_cluster", "serve", str(config), "--set", f"api.port={port}"]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        give_up_s = time.monotonic() + _START_S
        while "ready: http" not in log.read_text():
            if process.poll() is not None or time.monotonic() > give_up_s:
                raise RuntimeError(f"the server is not ready; its log ends so:\n{log.read_text()[-2000:]}")
            time.sleep(_POLL_S)
        yield Server(f"http://127.0.0.1:{port}", process.pid)
    finally:
        family = children_of(process.pid)
        process.send_signal(signal.SIGINT)  # which one that is still starting cleans up after, too
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
        left = [pid for pid in family if "haproxy" in _title_of(pid)]
        if left:
            print(f"HAProxy has outlived its server: {left}")


def children_of(pid: int) -> list[int]:
    """All processes below this one."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            fields = _stat(int(entry.name))
            if fields:
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def _stat(pid: int) -> list[str]:
    """Fields of its /proc/PID/stat from the state on; none when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _rss_of(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[21]) * _PAGE_BYTES if fields else 0


def _title_of(pid: int) -> str:
    """The command without its arguments, which is where Ray writes what an actor is."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0].rpartition("/")[2]
    except OSError:
        return ""


def _name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
