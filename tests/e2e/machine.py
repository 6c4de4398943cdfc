"""A machine of its own, as namespaces of this one: nobody else's ports, processes, Ray and home. Linux, root."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.e2e.application import eventually

ROOT = Path(__file__).parents[2]
_TOOLS = ("setpriv", "unshare", "nsenter", "ip", "curl")
_OWN = ("/tmp/ray", "/tmp/haproxy-serve")
"""Folders that Ray and Serve share among all of a machine."""
_START_TIMEOUT_S = 20.0


def obstacle() -> str:
    """Why there can be no such machine here; "" if there can."""
    if os.geteuid() != 0:
        return "namespaces need root"
    if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return f"no {', '.join(missing)}"
    tried = subprocess.run([*_unshare(), "true"], capture_output=True, text=True, check=False)
    return f"no namespaces: {tried.stderr.strip()}" if tried.returncode else ""


def _unshare() -> list[str]:
    """It ends with whoever started it, however that one ends, and takes all its processes along."""
    return [
        "setpriv",
        "--pdeathsig",
        "KILL",
        "unshare",
        "--net",
        "--pid",
        "--mount",
        "--fork",
        "--kill-child",
        "--mount-proc",
    ]


class Machine:
    """Owns the namespaces, and all processes in them, which end with it.

    Args:
        folder: for its home, its logs and what it keeps in /tmp.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._commands = folder, 0
        steps = ["ip link set lo up"]
        for place in _OWN:
            mine = folder / Path(place).name
            mine.mkdir()
            steps.append(f"mkdir -p {place} && mount --bind {mine} {place}")
        first = (
            f'{" && ".join(steps)} && trap "" CHLD && echo ready && exec sleep infinity'  # who ignores CHLD reaps all
        )
        self._popen = subprocess.Popen([*_unshare(), "sh", "-c", first], stdout=subprocess.PIPE, text=True)
        assert self._popen.stdout is not None
        assert self._popen.stdout.readline() == "ready\n"
        children = Path(f"/proc/{self._popen.pid}/task/{self._popen.pid}/children")
        self._init = int(children.read_text().split()[0])
        self.environment = {
            **os.environ,
            "HOME": str(folder),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_TMPDIR"):
            self.environment.pop(name, None)

    def start(self, command: str) -> subprocess.Popen[str]:
        """A shell command from the repository's root; what it says goes to a file."""
        enter = ["nsenter", "--target", str(self._init), "--net", "--pid", "--mount", "--wd=" + str(ROOT)]
        self._commands += 1
        log = self._log(self._commands)
        with log.open("w") as out:
            return subprocess.Popen(
                [*enter, "sh", "-c", command], env=self.environment, stdout=out, stderr=subprocess.STDOUT, text=True
            )

    def run(self, command: str, timeout_s: float = 300.0) -> str:
        """What the command said; fails when it fails, or takes longer."""
        popen = self.start(command)
        log = self._log(self._commands)
        try:
            code = popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            popen.kill()
            code = -1
        said = log.read_text()
        assert code == 0, f"{command}: {code}\n{said[-3000:]}"
        return said

    def processes(self, word: str) -> list[str]:
        """Command lines with this word of all processes on the machine, but for those that have ended."""
        lines = self.run("ps -e -o stat= -o args= -ww").splitlines()
        return [line for line in lines if word in line and not line.startswith("Z") and "ps -e" not in line]

    def close(self) -> None:
        """All its processes are killed with the first one."""
        self._popen.kill()
        self._popen.wait(_START_TIMEOUT_S)

        def objection() -> str:
            return "" if not Path(f"/proc/{self._init}").exists() else "its first process is still there"

        eventually(objection, _START_TIMEOUT_S)

    def _log(self, number: int) -> Path:
        return self._folder / f"command-{number}.log"
