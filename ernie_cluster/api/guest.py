"""Who sent a request, and what he may use of prompts, answers and pictures."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import cast

import numpy as np
from numpy.typing import NDArray
from starlette.types import Scope

from ernie_cluster.api.backend import Backend, ModelStatus, ReplicaExperts, ReplicaLoad
from ernie_cluster.api.operator import ClusterView, DecisionView, FaultsView, Order, ReplicaView
from ernie_cluster.api.prepare import Job
from ernie_cluster.api.ratelimit import Amounts, Budget
from ernie_cluster.errors import Overloaded, ReplicaError
from ernie_cluster.faults import FaultOrder
from ernie_cluster.request import GenerationRequest, MediaInput, TokenEvent

_GUEST = "ernie_cluster.guest"


class Guest:
    """Who sent a request, and what he may use."""

    def __init__(self, name: str = "", cache_salt: bytes = b"", budget: Budget | None = None) -> None:
        self.name = name
        """Of the key; empty where none was needed."""
        self.cache_salt = cache_salt
        """See `salted`."""
        self._budget = budget

    def knock(self) -> None:
        """One request comes in. Raises RateLimited, also when no token is left for a prompt."""
        if self._budget is not None:
            self._budget.take({"requests": 1}, need={"tokens": 1})

    def pay(self, job: Job, backend: Backend) -> Backend:
        """Take the prompt's price; the answer's is charged as it comes out of what is returned.

        Raises:
            RateLimited: not now. InvalidRequest: never under this key's limits.
        """
        if self._budget is None:
            return backend
        price = price_of(job)
        self._budget.take(price)
        return PaidBackend(backend, self._budget, price, frozenset(r.request_id for r in job.requests))

    def headers(self) -> list[tuple[bytes, bytes]]:
        """What is left, for the response."""
        return [] if self._budget is None else self._budget.headers()


ANYBODY = Guest()


def guest_of(scope: Scope) -> Guest:
    """Whom the door let in; anybody, where there is no door."""
    guest: Guest = scope.get(_GUEST, ANYBODY)
    return guest


def scope_of(scope: Scope, guest: Guest) -> Scope:
    """The scope from which `guest_of` reads this guest."""
    return {**scope, _GUEST: guest}


def price_of(job: Job) -> Amounts:
    """Prompt tokens and pixels; each prompt counts once, however many answers it gets."""
    return _price_of(job.requests[:: job.num_answers])


def _price_of(prompts: Sequence[GenerationRequest]) -> Amounts:
    num_pixels = sum(media.num_pixels for request in prompts for media in request.media)
    return {"tokens": sum(request.num_prompt_tokens for request in prompts), "pixels": num_pixels}


class PaidBackend:
    """The backend for one job whose prompt is paid for: charges the answer, and gives back what got none.

    Prompts of further rounds, which the job did not know of, are charged as they come.
    """

    def __init__(self, backend: Backend, budget: Budget, price: Amounts, paid_ids: frozenset[str]) -> None:
        self._backend = backend
        self._budget = budget
        self._price: Amounts = price
        self._paid_ids = paid_ids

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[list[TokenEvent]]:
        # `Backend.generate` is closed early by aclose(), see `Answer`
        events = cast("AsyncGenerator[list[TokenEvent]]", self._backend.generate(request))
        further: Amounts = {} if request.request_id in self._paid_ids else _price_of([request])
        self._budget.charge(further)
        try:
            async with aclosing(events):
                async for batch in events:
                    self._price = further = {}  # work was done for it
                    self._budget.charge({"tokens": sum(len(event.token_ids) for event in batch)})
                    yield batch
        except (Overloaded, ReplicaError):
            price, self._price = self._price, {}
            self._budget.refund(price)
            self._budget.refund(further)
            raise

    async def knock(self, model: str, max_tokens: int, priority: int, timeout_s: float) -> None:
        await self._backend.knock(model, max_tokens, priority, timeout_s)

    async def embed(self, model: str, media: MediaInput, timeout_s: float) -> NDArray[np.float32]:
        """Charged when it is there."""
        vector = await self._backend.embed(model, media, timeout_s)
        self._budget.charge({"pixels": media.num_pixels})
        return vector

    async def status(self) -> list[ModelStatus]:
        return await self._backend.status()

    async def loads(self) -> list[ReplicaLoad]:
        return await self._backend.loads()

    async def experts(self) -> list[ReplicaExperts]:
        return await self._backend.experts()

    async def cluster(self) -> ClusterView:
        return await self._backend.cluster()

    async def decisions(self) -> list[DecisionView]:
        return await self._backend.decisions()

    async def faults(self, order: FaultOrder) -> FaultsView:
        return await self._backend.faults(order)

    async def order(self, order: Order) -> ReplicaView:
        return await self._backend.order(order)

    async def close(self) -> None:
        await self._backend.close()
