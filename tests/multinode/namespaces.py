"""Machines, as network namespaces of this one: they reach each other through a bridge alone, which can be cut. Linux, root."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

_NOBODY = "02:00:00:00:00:01"
"""A hardware address that nothing on the bridge has."""
_KILL_TIMEOUT_S = 20.0
_STRIDE = 0x3001
"""Between the names of one process's bridges, so that they are no neighbour's."""
_numbers = itertools.count()


def obstacle() -> str:
    """Why there can be no namespaces here; "" if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "no `ip` (iproute2)"
    name = f"em{os.getpid()}-try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"no network namespaces: {made.stderr.strip()}"
    _ip("netns", "del", name)
    return ""


class Namespaces:
    """Owns a bridge, a namespace per machine, and all processes in them.

    Args:
        names: of the machines, in the order of their addresses.
    """

    def __init__(self, names: Sequence[str]) -> None:
        tag = (os.getpid() + _STRIDE * next(_numbers)) % 0x10000
        self._bridge, self._subnet = f"em{tag:x}", f"10.{100 + tag // 256 % 100}.{tag % 256}"
        self.gateway = f"{self._subnet}.1"
        """This process's own address on the bridge."""
        self._number = {name: i for i, name in enumerate(names)}

    def __enter__(self) -> Namespaces:
        try:
            _ip("link", "add", self._bridge, "type", "bridge")
            _ip("addr", "add", f"{self.gateway}/24", "dev", self._bridge)
            _ip("link", "set", self._bridge, "up")
            for name in self._number:
                self._add(name)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill whoever lives there, and remove it all; for whatever state it is in."""
        for name in self._number:
            if os.path.exists(f"/run/netns/{self._space(name)}"):
                self.kill(name)
                _ip("netns", "del", self._space(name))
            _remove(self._cable(name))  # which its namespace, once that is gone altogether, has taken along
        _remove(self._bridge)

    def address(self, name: str) -> str:
        return f"{self._subnet}.{10 + self._number[name]}"

    def command(self, name: str, *command: str) -> list[str]:
        """The same command, to be run on that machine."""
        return ["ip", "netns", "exec", self._space(name), *command]

    def unplug(self, name: str) -> None:
        """Nobody reaches the machine, nor it anybody; no end of a connection hears of it."""
        _ip("link", "set", self._cable(name), "down")

    def plug(self, name: str) -> None:
        """The opposite, as at the start."""
        _ip("link", "set", self._cable(name), "up")

    def kill(self, name: str) -> None:
        """SIGKILL to everybody on the machine; returns when nobody is left. Unplug it first, and its power has failed."""
        deadline = time.monotonic() + _KILL_TIMEOUT_S
        while pids := _ip("netns", "pids", self._space(name)).split():
            assert time.monotonic() < deadline, f"{name} still has {len(pids)} processes"
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.01)

    def command_lines(self, name: str) -> list[str]:
        """Of all processes on the machine."""
        lines = []
        for pid in _ip("netns", "pids", self._space(name)).split():
            with contextlib.suppress(OSError):
                lines.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " "))
        return lines

    @contextlib.contextmanager
    def parted(self, one: str, other: str) -> Iterator[None]:
        """These two do not reach each other, silently, while all others reach both."""
        ends = ((one, other), (other, one))
        for here, there in ends:
            self._in(
                here, "neigh", "replace", self.address(there), "lladdr", _NOBODY, "dev", "eth0", "nud", "permanent"
            )
        try:
            yield
        finally:
            for here, there in ends:
                self._in(here, "neigh", "del", self.address(there), "dev", "eth0")

    def _add(self, name: str) -> None:
        space, cable = self._space(name), self._cable(name)
        _ip("netns", "add", space)
        _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("link", "set", cable, "master", self._bridge, "up")
        self._in(name, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
        self._in(name, "link", "set", "lo", "up")
        self._in(name, "link", "set", "eth0", "up")
        self._in(name, "route", "add", "default", "via", self.gateway)  # by which programs find their own address

    def _space(self, name: str) -> str:
        return f"{self._bridge}-{name}"

    def _cable(self, name: str) -> str:
        return f"{self._bridge}v{self._number[name]}"

    def _in(self, name: str, *args: str) -> None:
        _ip("-n", self._space(name), *args)


def _remove(link: str) -> None:
    with contextlib.suppress(subprocess.CalledProcessError):  # it is not there
        _ip("link", "del", link)


def _ip(*args: str) -> str:
    return subprocess.run(["ip", *args], check=True, capture_output=True, text=True, timeout=30).stdout
