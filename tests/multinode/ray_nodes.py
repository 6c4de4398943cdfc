"""Ray's processes on machines that are namespaces, and the Redis that the head keeps its tables in."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ernie_cluster.actors.environment import SETTINGS
from tests.e2e.application import eventually
from tests.multinode.namespaces import Namespaces

GCS_PORT = 6379
REDIS_PORT = 6380
_STORE_BYTES = 100 << 20
_START_TIMEOUT_S = 90.0

HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}
"""How the head notices a machine that is gone; Ray's own settings take three to ten times as long."""


@dataclass(frozen=True)
class Machine:
    """What one node is started with."""

    labels: tuple[str, ...] = ()
    num_cpus: int = 1
    """As many replicas as it has place for; none on the head."""


class Redis:
    """Owns a redis-server that keeps nothing on disk.

    Args:
        host: to listen on.
    """

    def __init__(self, host: str) -> None:
        self.address = f"{host}:{REDIS_PORT}"
        command = ["redis-server", "--bind", host, "--port", str(REDIS_PORT), "--save", "", "--protected-mode", "no"]
        self._popen = subprocess.Popen(command, stdout=subprocess.DEVNULL)

        def objection() -> str:
            with socket.socket() as s:
                return f"nobody listens at {self.address}" if s.connect_ex((host, REDIS_PORT)) else ""

        eventually(objection, 20)

    @staticmethod
    def is_installed() -> bool:
        return shutil.which("redis-server") is not None

    def close(self) -> None:
        self._popen.kill()
        self._popen.wait()


class RayNodes:
    """Owns Ray's processes on each machine; the first machine is the head. All are killed with their namespaces.

    Args:
        spaces: the machines.
        machines: what each is started with, the head first.
        folder: for the nodes' logs and sockets; its path has to be short.
        storage: environment of the head's table server, such as RAY_REDIS_ADDRESS; empty = it keeps them in memory.
    """

    def __init__(
        self, spaces: Namespaces, machines: Mapping[str, Machine], folder: Path, storage: Mapping[str, str]
    ) -> None:
        self._spaces, self._machines, self._folder, self._storage = spaces, machines, folder, storage
        self.names = tuple(machines)
        self.head = self.names[0]
        self._popen: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def address(self) -> str:
        return f"{self._spaces.address(self.head)}:{GCS_PORT}"

    def start_all(self) -> None:
        self.start(self.head)
        for name in self._machines:
            if name != self.head:
                self.start(name)

    def start(self, name: str) -> None:
        """Start a node; returns for the head when its port answers, for others at once."""
        machine, home = self._machines[name], self._home(name)
        home.mkdir(exist_ok=True)
        # Ray sees the processes of all machines here, and would take those of others for a head that runs already
        (home / "ray_current_cluster").unlink(missing_ok=True)
        where = ["--address", self.address]
        if name == self.head:
            where = ["--head", "--port", str(GCS_PORT), "--include-dashboard", "false"]
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *where,
            "--node-ip-address", self._spaces.address(name), "--temp-dir", str(home), "--num-cpus",
            str(0 if name == self.head else machine.num_cpus), "--object-store-memory", str(_STORE_BYTES),
            "--include-log-monitor", "false", "--disable-usage-stats",
        ]  # fmt: skip
        command += [f"--labels={','.join(machine.labels)}"] if machine.labels else []
        with (home / "start.log").open("ab") as log:
            self._popen[name] = subprocess.Popen(
                self._spaces.command(name, *command), env=self.environment(name), stdout=log, stderr=log
            )
        if name == self.head:
            eventually(lambda: self._objection_to(name), _START_TIMEOUT_S)

    def check(self) -> None:
        """Fails when a node has ended that nobody killed."""
        for name, popen in self._popen.items():
            assert popen.poll() in (None, -signal.SIGKILL), (self._home(name) / "start.log").read_text()[-2000:]

    def kill(self, name: str) -> float:
        """All processes of a machine, at once; the time at which they were gone."""
        self._spaces.kill(name)
        self._popen[name].wait(20)
        return time.monotonic()

    def machine_of(self, node_id: str) -> str:
        """The machine of a node by the id that Ray has given it."""
        for name in self._machines:
            if any(f"--node_id={node_id}" in line for line in self._spaces.command_lines(name)):
                return name
        raise AssertionError(f"no machine has node {node_id}")

    def environment(self, name: str) -> dict[str, str]:
        """What processes on that machine are started with."""
        home = self._home(name)
        return {
            **os.environ, **SETTINGS, **HEALTH, **(self._storage if name == self.head else {}),
            "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1",
            # the machines of a test share one disk
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{home}/haproxy.cfg",
            "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{home}/admin.sock",
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{home}/metrics.sock",
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(home),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{home}/server-state",
            "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        }  # fmt: skip

    def _home(self, name: str) -> Path:
        return self._folder / name

    def _objection_to(self, name: str) -> str:
        said = (self._home(name) / "start.log").read_text()
        assert self._popen[name].poll() is None, said[-2000:]
        with socket.socket() as s:
            return f"not there:\n{said[-500:]}" if s.connect_ex((self._spaces.address(name), GCS_PORT)) else ""
