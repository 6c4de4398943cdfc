"""Programs that the tests start as a user does, and what is left of them afterwards. Reads /proc; Linux only."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.e2e.application import eventually


@dataclass(frozen=True)
class Process:
    """One process; the start time tells it from a later one with the same number."""

    pid: int
    start_ticks: int

    @property
    def is_alive(self) -> bool:
        return self == process(self.pid)

    @property
    def name(self) -> str:
        try:
            return Path(f"/proc/{self.pid}/cmdline").read_text().replace("\0", " ")[:80]
        except OSError:
            return "gone"


def process(pid: int) -> Process | None:
    """The process of this number, unless it is gone or a zombie."""
    fields = _stat(pid)
    return Process(pid, int(fields[19])) if fields and fields[0] != "Z" else None


def descendants(pid: int) -> set[Process]:
    """All processes below this one."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found: set[Process] = set()
    waiting = [pid]
    while waiting:
        for child in children.get(waiting.pop(), ()):
            waiting.append(child)
            if (known := process(child)) is not None:
                found.add(known)
    return found


def shared_memory_of(processes: set[Process]) -> set[str]:
    """Names in /dev/shm that these processes have mapped."""
    names: set[str] = set()
    for one in processes:
        try:
            names |= set(re.findall(r"/dev/shm/\S+", Path(f"/proc/{one.pid}/maps").read_text()))
        except OSError:
            continue
    return names


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third (state) on; empty when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    return text.rpartition(")")[2].split()


@dataclass
class Program:
    """A run of the `ernie-cluster` command.

    Args:
        arguments: of the command.
        env: replaces or adds to this process's.
    """

    arguments: Sequence[str]
    env: dict[str, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    """Of both outputs, as they came."""

    def __post_init__(self) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "ernie_cluster", *self.arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **self.env},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def wait_for(self, words: str, timeout_s: float) -> None:
        """Until a line has these words; fails when the program ends before."""

        def objection() -> str:
            if any(words in line for line in self.lines):
                return ""
            assert self._popen.poll() is None, f"ended without {words!r}:\n{self.text}"
            return f"no {words!r} in:\n{self.text}"

        eventually(objection, timeout_s)

    def family(self) -> set[Process]:
        """All processes that it has started, and that these have."""
        return descendants(self._popen.pid)

    def send(self, number: int) -> None:
        self._popen.send_signal(number)

    def end(self, timeout_s: float) -> tuple[int, float]:
        """Its exit code, and the seconds that it took from now on."""
        start = time.monotonic()
        code = self._popen.wait(timeout_s)
        self._reader.join(10)
        return code, time.monotonic() - start

    def kill(self) -> None:
        """For a test that has failed: leave nothing."""
        family = self.family()
        self._popen.kill()
        for one in family:
            if one.is_alive:
                os.kill(one.pid, 9)

    def _read(self) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            self.lines.append(line)
