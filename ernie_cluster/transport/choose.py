"""Which transports can join two replicas, the best first, and why. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ernie_cluster.transport.base import JSON

TransportKind = Literal["ipc", "nccl", "shared_memory", "nixl", "object_store"]
Wish = Literal["auto", "local", "ipc", "nccl", "shared_memory", "nixl", "object_store"]
"""What the configuration asks for."""


@dataclass(frozen=True, slots=True)
class GpuEndpoint:
    """What a replica tells about the GPU that its model is on."""

    gpu_id: str
    """Another one for each GPU, the same in each process that sees it."""
    address: str | None = field(default=None, repr=False)
    """Address of its `GpuReceiver`; None where it has none. Holds a secret: keep it out of logs."""
    fault: str = ""
    """Why it has none."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What a replica tells about how it can be reached."""

    host_id: str
    """Equal exactly for processes that can share memory, see `staging.host_id`."""
    shm_address: str | None = field(repr=False)
    """Address of its `SharedMemoryReceiver`; None where it has none. Holds a secret: keep it out of logs."""
    actor_name: str
    """Name by which object references can be handed to it."""
    gpu: GpuEndpoint | None = None
    """None where the model is on the CPU."""
    has_nixl: bool = False
    """It reads pieces by NIXL."""
    others: tuple[Endpoint, ...] = field(default=(), repr=False)
    """Of the ranks that hold the other KV heads, in order; empty where this one holds them all."""

    @property
    def ranks(self) -> tuple[Endpoint, ...]:
        """All ranks that KV goes to, this one first."""
        return replace(self, others=()), *self.others

    def without_gpu(self, why: str) -> Endpoint:
        """The same rank, by the plain ways through host memory only."""
        gpu = None if self.gpu is None else GpuEndpoint(self.gpu.gpu_id, None, why)
        return replace(self, gpu=gpu, has_nixl=False)

    def to_json(self) -> JSON:
        """As a message bears it, without `others`; with its secrets."""
        gpu: JSON = None if self.gpu is None else [self.gpu.gpu_id, self.gpu.address, self.gpu.fault]
        return [self.host_id, self.shm_address, self.actor_name, gpu, self.has_nixl]

    @classmethod
    def from_json(cls, said: Any) -> Endpoint:
        """What `to_json` made."""
        host_id, shm_address, actor_name, gpu, has_nixl = said
        return cls(host_id, shm_address, actor_name, None if gpu is None else GpuEndpoint(*gpu), has_nixl)


@dataclass(frozen=True, slots=True)
class Choice:
    """A transport, and why."""

    kind: TransportKind
    reason: str


def choices(sender: Endpoint, receiver: Endpoint, wish: Wish = "auto") -> tuple[Choice, ...]:
    """Transports in the order in which to try them; the last is the object store, which reaches every actor.

    Between GPUs CUDA IPC inside a host (one copy, and nothing spins when a peer dies), else NCCL; through host memory
    shared memory inside a host. What was wished for comes first; NIXL is not chosen otherwise. A reason says why each
    better one cannot be.
    """
    obstacles = _obstacles(sender, receiver, wish)
    order: list[TransportKind] = ["ipc", "nccl", "shared_memory", "nixl", "object_store"]
    if wish not in ("auto", "local"):
        order.sort(key=lambda kind: kind != wish)
    where = (
        "on the same host" if sender.host_id == receiver.host_id else "on different hosts or in different namespaces"
    )
    found: list[Choice] = []
    passed_over: dict[str, list[str]] = {}  # obstacle -> transports that it bars
    for kind in order:
        obstacle = obstacles[kind]
        if obstacle is not None:
            passed_over.setdefault(obstacle, []).append(kind)
            continue
        why = "".join(f"; not {' or '.join(kinds)}: {obstacle}" for obstacle, kinds in passed_over.items())
        asked = f"; transport.kind = {wish} asks for it" if kind == wish else ""
        found.append(Choice(kind, f"{sender.actor_name} and {receiver.actor_name} are {where}{asked}{why}"))
        if kind == "object_store":
            break
    return tuple(found)


def _obstacles(sender: Endpoint, receiver: Endpoint, wish: Wish) -> dict[TransportKind, str | None]:
    """Why each transport cannot join these two; None where it can."""
    apart = None if sender.host_id == receiver.host_id else "they are on different hosts or in different namespaces"
    no_gpu = next((fault for fault in map(_gpu_fault, (sender, receiver)) if fault is not None), None)
    one_gpu = None
    if sender.gpu is not None and receiver.gpu is not None and sender.gpu.gpu_id == receiver.gpu.gpu_id:
        one_gpu = "they share one GPU, and NCCL takes no two ranks on one"
    no_memory = None if receiver.shm_address is not None else f"{receiver.actor_name} offers no shared memory"
    no_nixl = next((f"{e.actor_name} has no NIXL" for e in (sender, receiver) if not e.has_nixl), None)
    if wish != "nixl":
        no_nixl = "Ray calls its interface alpha, so it is used only where transport.kind names it"
    return {
        "ipc": no_gpu or apart,
        "nccl": no_gpu or one_gpu,
        "shared_memory": apart or no_memory,
        "nixl": no_nixl,
        "object_store": None,
    }


def _gpu_fault(endpoint: Endpoint) -> str | None:
    if endpoint.gpu is None:
        return f"{endpoint.actor_name} has its model on the CPU"
    if endpoint.gpu.address is None:
        return f"{endpoint.actor_name} cannot reach other GPUs: {endpoint.gpu.fault}"
    return None
