"""What the API needs of the rest: tokens for a request, and a way to stop them.

The API is handed a `Backend` and imports none; `actors/` has the real one, `tests/fakes.py` a twin without Ray.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ernie_cluster.api.operator import Operations
from ernie_cluster.config.experts import ExpertUse, LayerExperts
from ernie_cluster.request import GenerationRequest, MediaInput, TokenEvent


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """Whether one served model can take requests, and what is missing if not."""

    name: str
    is_ready: bool
    detail: str
    """For example "waiting for a decode replica"; empty when ready."""


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """What one replica that takes new work has to do, with what is booked for it."""

    model: str
    role: str
    replica: str
    """The same after a restart."""
    num_running: int
    num_waiting: int
    waiting_tokens: int
    """Prompt tokens not yet computed; media tokens not yet encoded on a vision replica."""
    free_blocks: int
    """KV blocks that nothing holds or is promised; what a prefix cache could evict counts as free."""
    total_blocks: int
    """0 where there is no KV."""
    experts: ExpertUse | None = None
    """None where there are none."""


@dataclass(frozen=True, slots=True)
class ReplicaExperts:
    """Use and place of the experts of one replica, or of one of its groups of ranks."""

    model: str
    role: str
    replica: str
    layers: list[LayerExperts]


class Backend(Operations, Protocol):
    """Serves requests. One call of `generate` per request; all methods are safe to call concurrently on one loop."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[list[TokenEvent]]:
        """Stream the answer.

        Yields lists of events of this one request, indices ascending without gap or repetition. The last event bears
        a finish reason. Closing the iterator early aborts the request everywhere.

        Raises:
            Overloaded: nothing was started; come back after `retry_after_s`.
            DeadlineExceeded, ReplicaError: the request ended without an answer, or in the middle of one.
        """
        ...

    async def knock(self, model: str, max_tokens: int, priority: int, timeout_s: float) -> None:
        """Before work is done for a request with pictures: whether it would be refused, however small its prompt.

        Args:
            model: served name.
            max_tokens: of its answer, at least.
            priority: see `GenerationRequest`.
            timeout_s: what is left of its time.

        Raises:
            Overloaded: it would be. Nothing else: that it may be served is no promise.
        """
        ...

    async def embed(self, model: str, media: MediaInput, timeout_s: float) -> NDArray[np.float32]:
        """One vector for a picture, from a model's vision pool: pictures that look alike have vectors that point alike.

        Args:
            model: served name.
            media: with patches; its place in a prompt does not matter.
            timeout_s: deadline. Giving up before it ends the work.

        Returns:
            float32 [width of the model], of length 1.

        Raises:
            Overloaded, DeadlineExceeded, ReplicaError: as in `generate`.
        """
        ...

    async def status(self) -> list[ModelStatus]:
        """State of every served model; answers within a second."""
        ...

    async def loads(self) -> list[ReplicaLoad]:
        """Of every replica that takes new work, a few seconds old at most.

        Raises:
            ReplicaError: nobody can tell.
        """
        ...

    async def experts(self) -> list[ReplicaExperts]:
        """Of every replica that takes new work and has experts; asks them all.

        Raises:
            ReplicaError: one could not tell.
        """
        ...

    async def close(self) -> None:
        """Abort what runs and give everything back."""
        ...
