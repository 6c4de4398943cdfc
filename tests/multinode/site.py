"""An application on several machines, as its clients and operators see it: over HTTP, at any machine that listens."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.load import dump_config
from tests.e2e.application import Application, Streamed, eventually
from tests.multinode.namespaces import Namespaces
from tests.multinode.ray_nodes import RayNodes


@dataclass
class Door(Application):
    """The application by one machine's port. The inside of Ray is out of reach from here."""

    host: str = ""

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.config.api.port}"

    def view(self) -> dict[str, Any]:
        """What an operator sees."""
        response = self.get("/admin/status")
        assert response.status_code == 200, response.text
        view: dict[str, Any] = response.json()
        return view

    def replicas_of(self, role: str) -> list[dict[str, Any]]:
        return [r for r in self.view()["replicas"] if r["role"] == role and r["phase"] == "ready"]

    def objection(self) -> str:
        """Why not every replica is there, ready and at rest; "" if they are."""
        try:
            view = self.view()
        except (AssertionError, httpx.HTTPError) as e:
            return repr(e)
        for model in self.config.models:
            for pool in model.pools:
                found = [r for r in view["replicas"] if r["role"] == pool.role and r["phase"] == "ready"]
                if len(found) != pool.num_replicas:
                    return f"{len(found)} of {pool.num_replicas} {pool.role} replicas"
                for r in found:
                    if r["num_running"] or r["num_waiting"] or r["free_blocks"] < r["total_blocks"]:
                        return f"{r['replica']} is not at rest: {r}"
        return ""

    async def watch(self, client: httpx.AsyncClient, body: dict[str, Any]) -> AsyncGenerator[Watched, None]:
        """A stream, with the longest that its client waited for anything."""
        watched = Watched()
        async for answer in self.stream(client, body):
            now = time.monotonic()
            watched.longest_wait_s, watched.last_s = max(watched.longest_wait_s, now - watched.last_s), now
            watched.answer = answer
            yield watched


@dataclass
class Watched:
    """A stream as it comes."""

    answer: Streamed = field(default_factory=Streamed)
    last_s: float = field(default_factory=time.monotonic)
    longest_wait_s: float = 0.0


class Site:
    """Owns the `serve` command, on the head; what it has started ends with the machines.

    Args:
        config: what is served.
        spaces: the machines.
        nodes: Ray on them.
        folder: for the configuration and the command's output.
    """

    def __init__(self, config: ClusterConfig, spaces: Namespaces, nodes: RayNodes, folder: Path) -> None:
        self.config, self.spaces, self.nodes = config, spaces, nodes
        self._log, path = folder / "serve.log", folder / "cluster.yaml"
        path.write_text(dump_config(config))
        serve = [sys.executable, "-m", "ernie_cluster", "serve", str(path), "--address", nodes.address]
        with self._log.open("wb") as log:
            self._popen = subprocess.Popen(
                spaces.command(nodes.head, *serve), env=nodes.environment(nodes.head), stdout=log, stderr=log
            )

    def wait(self, timeout_s: float) -> None:
        """Until it is served; fails with the command's words when that ends before."""

        def objection() -> str:
            self.nodes.check()
            said = self._log.read_text()
            assert self._popen.poll() is None, said[-3000:]
            return "" if "ready: http" in said else f"not ready:\n{said[-1000:]}"

        eventually(objection, timeout_s)

    def door(self, machine: str = "front") -> Door:
        return Door(self.config, self.spaces.address(machine))

    def become_whole(self, timeout_s: float) -> None:
        """Until all replicas are there and at rest."""
        eventually(self.door().objection, timeout_s)

    def machine_of(self, replica: dict[str, Any]) -> str:
        return self.nodes.machine_of(replica["node"])

    def busiest(self, role: str) -> str:
        """The machine of the replica of this role with most requests."""
        return self.machine_of(max(self.door().replicas_of(role), key=lambda r: r["num_running"]))

    def machines_of_api(self) -> list[str]:
        """Where API replicas run."""
        return [
            name for name in self.nodes.names if "ServeReplica:ernie:api" in "".join(self.spaces.command_lines(name))
        ]
