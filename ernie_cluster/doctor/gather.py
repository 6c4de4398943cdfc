"""The one place that acts: facts by name, each in a thread of its own with a deadline.

A fact that raises or does not come in time is `Missing`, so nothing here fails or hangs because a tool does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ernie_cluster.doctor import machine, ports
from ernie_cluster.doctor.facts import Missing, Stored
from ernie_cluster.doctor.need import Need
from ernie_cluster.errors import ErnieClusterError

Facts = Mapping[str, Any]
"""Name -> fact, of the kind that its gatherer returns, or `Missing`."""

TIMEOUT_S = 20.0
"""For each fact of a machine, from when all are asked for at once."""
LONG_TIMEOUT_S = 120.0
"""For those that import torch and read hundreds of headers, from a disk on the network."""
_LONG = frozenset({"checkpoints", "gpus", "nccl"})


def _checkpoints(need: Need) -> tuple[Stored, ...]:
    from ernie_cluster.doctor.checkpoints import inspect  # torch

    models = need.config.models if need.config is not None else ()
    return tuple(inspect(model.name, model.path) for model in models if _is_folder(model.path))


def _is_folder(path: str) -> bool:
    """And no repository of the hub that nobody has fetched yet."""
    return Path(path).exists() or Path(path).is_absolute()


GATHERERS: Mapping[str, Callable[[Need], object]] = {
    "software": machine.software,
    "cpu": machine.cpu,
    "gpus": machine.gpus,
    "nccl": machine.nccl,
    "ports": ports.ports,
    "haproxy": machine.haproxy,
    "shm": machine.shm,
    "open_files": machine.open_files,
    "memory": machine.memory,
    "disks": machine.disks,
    "checkpoints": _checkpoints,
}


def timeout_of(name: str) -> float:
    """How long a fact may take to be found."""
    return LONG_TIMEOUT_S if name in _LONG else TIMEOUT_S


def gather(
    names: Iterable[str],
    need: Need,
    timeout_s: Callable[[str], float] | None = None,
    gatherers: Mapping[str, Callable[[Need], object]] = GATHERERS,
) -> dict[str, Any]:
    """Facts of this machine.

    Args:
        names: of `gatherers`.
        need: what they look for.
        timeout_s: of each by its name; a thread that is late is left behind, and ends with the process. None = see
            `timeout_of`.
        gatherers: for tests.
    """
    found: dict[str, Any] = {}

    def look(name: str) -> None:
        try:
            found[name] = gatherers[name](need)
        except ErnieClusterError as e:
            found[name] = Missing(str(e))
        except Exception as e:  # whatever a tool, a file or a driver does, it is one line of the report
            found[name] = Missing(f"{type(e).__name__}: {str(e).strip() or 'no explanation'}")

    wanted = tuple(names)
    threads = [threading.Thread(target=look, args=(name,), name=f"look-{name}", daemon=True) for name in wanted]
    for thread in threads:
        thread.start()
    start_s, late = time.monotonic(), dict[str, Missing]()
    for name, thread in zip(wanted, threads, strict=True):
        within_s = (timeout_s or timeout_of)(name)
        thread.join(max(0.0, start_s + within_s - time.monotonic()))
        late[name] = Missing(f"no answer within {within_s:g} s")
    return late | found
