"""Which transport joins two replicas, and why. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

TransportKind = Literal["shared_memory", "object_store"]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What a replica tells about how it can be reached."""

    host_id: str
    """Equal exactly for processes that can share memory, see `staging.host_id`."""
    shm_address: str | None = field(repr=False)
    """Address of its `SharedMemoryReceiver`; None where it has none. Holds a secret: keep it out of logs."""
    actor_name: str
    """Name by which object references can be handed to it."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A transport, and why."""

    kind: TransportKind
    reason: str


def choose(sender: Endpoint, receiver: Endpoint) -> Choice:
    """Shared memory where both can, else the object store, which reaches every actor."""
    if sender.host_id != receiver.host_id:
        return Choice(
            "object_store",
            f"{sender.actor_name} and {receiver.actor_name} are on different hosts or in different namespaces",
        )
    if receiver.shm_address is None:
        return Choice("object_store", f"{receiver.actor_name} is on the same host but offers no shared memory")
    return Choice("shared_memory", f"{sender.actor_name} and {receiver.actor_name} are on the same host")
