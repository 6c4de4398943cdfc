"""Faults on purpose, for tests and for staging: what may be made to fail, how, where and how often. Off unless configured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from ernie_cluster.config.checks import check_positive, check_range
from ernie_cluster.errors import ConfigError

Action = Literal["delay", "error", "drop", "corrupt", "kill", "stop"]
FaultRole = Literal["any", "vision", "prefill", "decode", "mixed", "router", "api"]

MAX_LASTS_S = 300.0

_PLAIN: tuple[Action, ...] = ("delay", "error", "kill", "stop")
_CALL: tuple[Action, ...] = (*_PLAIN, "drop")


@dataclass(frozen=True, slots=True)
class Point:
    """A place in our own code where a fault can strike."""

    meaning: str
    actions: tuple[Action, ...]


POINTS: Mapping[str, Point] = MappingProxyType(
    {
        "api.generate": Point("An API process is about to seek a path for an attempt at an answer.", _PLAIN),
        "router.acquire": Point("The router is about to choose and book a path.", _CALL),
        "router.release": Point("The router is about to take back what an attempt had booked.", _CALL),
        "router.register": Point("A replica tells the router that it is there, as each does every second.", _PLAIN),
        "replica.open_prefill": Point("A replica is asked to compute a prompt.", _CALL),
        "replica.open_decode": Point("A replica is asked to lease blocks for an answer.", _CALL),
        "replica.poll": Point("An API process asks an engine for new tokens.", _CALL),
        "replica.tell": Point("The router asks a replica what is new; silence here looks like a dead replica.", _CALL),
        "vision.encode": Point("A picture is about to be encoded.", _PLAIN),
        "vision.step": Point(
            "An encoder is about to run a picture, or a piece of a video, for which it had to wait.", _PLAIN
        ),
        "vision.send": Point("A picture is encoded, and its embeddings are about to leave.", _PLAIN),
        "prefill.step": Point("An engine is about to run a step with tokens of prompts.", _PLAIN),
        "decode.step": Point("An engine is about to run a step that has tokens of answers only.", _PLAIN),
        "transport.push": Point(
            "A piece of KV or of embeddings is packed and its checksum taken, and it is about to leave.",
            (*_CALL, "corrupt"),
        ),
        "transport.accept": Point(
            "A piece has arrived whole through host memory and is about to be written to its place.", _PLAIN
        ),
        "transport.commit": Point("A hand-over's last message is about to leave.", _CALL),
        "transport.call": Point("Any other message of a hand-over is about to leave, a claim for example.", _CALL),
    }
)
"""Where faults can strike, and with what."""


@dataclass(frozen=True, slots=True)
class FaultRule:
    """One fault: what happens at a point, in which processes, and how often. Every process counts for itself."""

    point: str
    """One of those that `ernie-cluster chaos --list` shows."""
    action: Action
    """delay: it takes longer. error: it fails. drop: it never happens, and nobody is told. corrupt: a bit flips, after the
    checksum was taken. kill: the process is gone (SIGKILL). stop: the process stands still (SIGSTOP) and goes on later."""
    lasts_s: float = 1.0
    """How long a delay or a stop lasts, more than 0 and at most 300."""
    role: FaultRole = "any"
    """Processes of this kind only; of replicas, the role that they were started with."""
    replica: str = "*"
    """Replicas whose id has this in it only; `*` and `?` stand for any characters and any one."""
    probability: float = 1.0
    """Of striking each time, 0 to 1."""
    after: int = 0
    """So many times nothing happens at first."""
    times: int | None = None
    """It strikes at most so often in each process, at least 1; None = without end."""

    def __post_init__(self) -> None:
        if self.point not in POINTS:
            raise ConfigError(f"point = {self.point!r} is not known; known: {', '.join(POINTS)}")
        if self.action not in POINTS[self.point].actions:
            possible = ", ".join(POINTS[self.point].actions)
            raise ConfigError(f"action = {self.action!r} cannot happen at {self.point}; possible there: {possible}")
        check_positive(self, "lasts_s")
        check_range(self, 0, "lasts_s", high=MAX_LASTS_S)
        check_range(self, 0, "probability", high=1)
        check_range(self, 0, "after")
        check_range(self, 1, "times")
        if not self.replica:
            raise ConfigError("replica = '' fits none; leave it out, or give a part of an id")


@dataclass(frozen=True, slots=True)
class FaultsConfig:
    """Faults on purpose. Never in production: whoever holds the admin key may then kill processes."""

    enabled: bool = False
    """Whether there are any, and whether operators may set some while the application runs."""
    seed: int = 0
    """Of the chances that faults have."""
    points: tuple[FaultRule, ...] = ()
    """Faults from the start, in every process that they fit, again and again."""

    def __post_init__(self) -> None:
        if self.points and not self.enabled:
            raise ConfigError("points are given while enabled = false; set faults.enabled to true, or remove them")
