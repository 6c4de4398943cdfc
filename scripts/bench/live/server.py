"""A server of one's own, as a user starts it, and what `/admin` says and does of its replicas."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import own_server
import yaml

_POLL_S = 0.3


@contextmanager
def serving(config: Mapping[str, Any], folder: Path) -> Iterator[int]:
    """`own_server.serving` with this configuration; its port.

    Args:
        config: as in a YAML file; says `api.port`.
        folder: for that file and the server's log.
    """
    file, port = folder / "cluster.yaml", int(config["api"]["port"])
    file.write_text(yaml.safe_dump(dict(config), sort_keys=False))
    with own_server.serving(file, port, folder / "serve.log"):
        yield port


def call(port: int, path: str, body: Mapping[str, Any] | None = None, timeout_s: float = 5.0) -> Any:
    """What the server answers to GET, or to POST where there is a body. Raises OSError and ValueError."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return json.loads(response.read())
    except urllib.error.HTTPError as e:
        raise OSError(f"{path}: {e.code} {e.read().decode(errors='replace')[:300]}") from None


@dataclass(frozen=True, slots=True)
class Fleet:
    """Replicas at one moment, from `GET /admin/status`."""

    counts: Mapping[tuple[str, str, str], int]
    """By model, role and phase."""
    used: float
    budget: float
    budget_unit: str

    @classmethod
    def of(cls, status: Mapping[str, Any]) -> Fleet:
        counts = Counter((r["model"], r["role"], r["phase"]) for r in status["replicas"])
        return cls(counts, float(status["used"]), float(status["budget"]), str(status["budget_unit"]))

    def doing(self, model: str, role: str) -> int:
        """Replicas that take work of this role."""
        return self.counts.get((model, role, "ready"), 0) + self.counts.get((model, role, "switching"), 0)

    def in_phase(self, model: str, phase: str) -> int:
        """Replicas of all roles in this phase."""
        return sum(n for (m, _, p), n in self.counts.items() if m == model and p == phase)


def set_split(port: int, model: str, prefill: int, timeout_s: float = 60.0) -> None:
    """Order so many replicas of a model to prefill, and the others to decode; done when each says that it does.

    Raises:
        OSError: an order was refused. RuntimeError: they did not follow in time.
    """
    deadline_s = time.monotonic() + timeout_s
    there = sorted(
        engines(port, model), key=lambda r: (r["role"] != "prefill", r["replica"])
    )  # as few as can be change
    ids = [r["replica"] for r in there]
    wanted = dict.fromkeys(ids[:prefill], "prefill") | dict.fromkeys(ids[prefill:], "decode")
    for replica in engines(port, model):
        if replica["role"] != wanted[replica["replica"]]:
            call(port, f"/admin/replicas/{replica['replica']}/role", {"role": wanted[replica["replica"]]})
    while {r["replica"]: r["role"] for r in engines(port, model) if r["phase"] == "ready"} != wanted:
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"the replicas of {model} did not become {prefill} + {len(ids) - prefill}")
        time.sleep(_POLL_S)


def engines(port: int, model: str) -> list[dict[str, Any]]:
    """The replicas of a model that compute tokens."""
    return [r for r in call(port, "/admin/status")["replicas"] if r["model"] == model and r["role"] != "vision"]
