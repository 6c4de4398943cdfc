"""What is known of a machine, a checkpoint or a cluster: plain values, gathered in one place and judged in another."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Missing:
    """In the place of a fact that nobody could find out."""

    reason: str


@dataclass(frozen=True, slots=True)
class Package:
    """A package that this one needs, by its own metadata."""

    name: str
    wanted: str
    """Versions, such as ">=2.60,<2.61"."""
    found: str | None
    """Its version; None = it is not installed."""
    extra: str = ""
    """The extra that it is needed for, such as gpu; empty = always."""


@dataclass(frozen=True, slots=True)
class Software:
    """The interpreter and what it finds."""

    python: str
    wanted_python: str
    packages: tuple[Package, ...]


@dataclass(frozen=True, slots=True)
class Cpu:
    """The processors of a machine."""

    name: str
    num_cores: int
    """That this process may use."""
    flags: frozenset[str]
    """As /proc/cpuinfo spells them."""


@dataclass(frozen=True, slots=True)
class Card:
    """One GPU, as nvidia-smi tells of it."""

    name: str
    memory_bytes: int
    driver: str
    capability: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Gpus:
    """The GPUs of a machine, and what torch makes of them."""

    cards: tuple[Card, ...]
    note: str = ""
    """Why there are none."""
    cuda: str = ""
    """Version that torch was built for; empty = for CPU only, or there are no cards."""
    num_usable: int = 0
    """That torch sees."""


@dataclass(frozen=True, slots=True)
class Nccl:
    """cupy, by which KV travels between GPUs of two nodes."""

    cupy: str
    version: int
    """Of the NCCL that it found, as 22703 for 2.27.3."""


@dataclass(frozen=True, slots=True)
class Port:
    """A TCP port that something of ours listens on."""

    number: int
    what: str
    """Who wants it: HTTP, gRPC, or a part of Ray."""
    holder: str
    """The program that listens there now; empty = it is free."""

    @property
    def is_ray(self) -> bool:
        """Whether a process of Ray, or of Serve's proxy, has it."""
        return self.holder.startswith(("ray", "gcs_server", "haproxy", "dashboard"))


@dataclass(frozen=True, slots=True)
class Program:
    """An executable."""

    path: str
    version: str
    """What it says itself."""


@dataclass(frozen=True, slots=True)
class Space:
    """Room below a folder."""

    path: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Disks:
    """Where checkpoints from the hub come to lie, and where Ray writes."""

    models: Space
    ray: Space
    missing_models: tuple[str, ...]
    """Repositories that the configuration names and the hub's cache has not."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Of this machine, or of the container that this process is in."""

    total_bytes: int
    available_bytes: int


@dataclass(frozen=True, slots=True)
class OpenFiles:
    """Limits of a process."""

    soft: int
    hard: int
    """Up to which Ray raises the soft one by itself."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A checkpoint's headers, held against the model of its config.json."""

    model: str
    """Served name."""
    folder: str
    num_tensors: int
    num_files: int
    num_bytes: int
    faults: tuple[str, ...]
    """What is missing, damaged or of another shape; with the remedy, as loading it would say."""


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the Ray cluster."""

    id: str
    name: str
    """Its address."""
    num_gpus: float
    error: str = ""
    """Why nothing could be run there."""


@dataclass(frozen=True, slots=True)
class Clock:
    """A node's clock against that of the machine that asks."""

    node: str
    ahead_s: float
    error_s: float
    """Half of the time that asking took."""


@dataclass(frozen=True, slots=True)
class Link:
    """The way between two nodes: TCP for plain bytes, or NCCL between a GPU of each."""

    first: str
    second: str
    round_trip_s: float = 0.0
    bytes_per_s: float = 0.0
    error: str = ""
    """Why there is none."""
    untried: str = ""
    """Why nobody could try it."""
