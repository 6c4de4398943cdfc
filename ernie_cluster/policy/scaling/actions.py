"""What the scaling decision can ask for. Each action says why, in numbers; who carries it out asks nothing else.

In the next snapshot its effect must be seen, finished or not: a replica told to switch is `switching` in its new role, one
that is to stop is `draining`, one to be started is `starting`, or `planned` while a move's GPUs are not free.
"""

from __future__ import annotations

from dataclasses import dataclass

from ernie_cluster.config.pool import Role


@dataclass(frozen=True, slots=True)
class SwitchRole:
    """From now on these replicas get work of the new role and none of the old; what they hold of it they finish beside.

    (An engine can do both. To let it run dry first would cost the capacity of whole answers, when it is short.)
    """

    model: str
    replica_ids: tuple[str, ...]
    source: Role
    target: Role
    reason: str


@dataclass(frozen=True, slots=True)
class Stop:
    """A replica that is to drain and end."""

    model: str
    replica_id: str


@dataclass(frozen=True, slots=True)
class MoveGpus:
    """Drain and stop replicas of other models; when their GPUs are free, start one replica here."""

    stops: tuple[Stop, ...]
    model: str
    role: Role
    reason: str


@dataclass(frozen=True, slots=True)
class ScaleOut:
    """Start replicas on free GPUs."""

    model: str
    role: Role
    count: int
    reason: str


@dataclass(frozen=True, slots=True)
class ScaleIn:
    """Drain and stop these replicas."""

    model: str
    role: Role
    replica_ids: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class ScaleToZero:
    """Drain and stop all replicas of a model; from now on its requests wait in its wake-up queue."""

    model: str
    replica_ids: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class WakeUp:
    """Start the first replicas of a model that has none, on free GPUs; then let go the requests of its wake-up queue."""

    model: str
    roles: tuple[Role, ...]
    reason: str


Action = SwitchRole | MoveGpus | ScaleOut | ScaleIn | ScaleToZero | WakeUp
