"""What all requests share: backend, processors, worker threads and the books of traffic."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

from starlette.responses import Response

from ernie_cluster.api.alias import Alias
from ernie_cluster.api.backend import Backend
from ernie_cluster.api.fetcher import Fetcher
from ernie_cluster.api.image_search import ImageSearcher
from ernie_cluster.api.limits import ApiLimits
from ernie_cluster.api.openai import encode, model_card
from ernie_cluster.api.processor import Processor
from ernie_cluster.api.tracing import NoTracer, Tracer
from ernie_cluster.api.traffic import Bodies, Meter, Traffic
from ernie_cluster.api.workers import Workers
from ernie_cluster.errors import DeadlineExceeded, UnknownModel
from ernie_cluster.observe.metrics import Metrics

T = TypeVar("T")

STATUS_TIMEOUT_S = 2.0
"""A backend that does not say how it is within this is not ready."""


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A whole response."""
    return Response(encode(value), status, headers=headers, media_type="application/json")


class Service:
    """What all requests share."""

    def __init__(
        self,
        backend: Backend,
        processors: Mapping[str, Processor],
        limits: ApiLimits,
        metrics: Metrics,
        fetcher: Fetcher | None = None,
        default_tools: Sequence[str] = (),
        searcher: ImageSearcher | None = None,
        alias: Alias | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self.backend = backend
        self.processors = processors
        self.limits = limits
        self.fetcher = fetcher or Fetcher()
        self.default_tools = default_tools
        self.searcher = searcher
        self.alias = alias
        self.workers = Workers(limits.preprocess_threads, limits.max_preparing, limits.media_threads)
        self.tracer: Tracer = tracer or NoTracer()
        bodies = Bodies(limits.max_bodies_bytes)
        self.traffic = Traffic(metrics, time.monotonic, limits.max_in_flight, bodies, self.tracer)
        self.created = int(time.time())
        """Since when the models are served, seconds since the epoch."""

    def processor(self, name: str) -> Processor:
        """Of a served model, or of the most able one behind the alias; raises UnknownModel, naming those that there are."""
        return self._processors_of(name)[0]

    @property
    def names(self) -> list[str]:
        """What clients may put into the field `model`."""
        return [*self.processors, *([] if self.alias is None else [self.alias.name])]

    def max_model_len(self, name: str) -> int:
        """Of a served model, or what all models behind the alias can hold."""
        return min(processor.max_model_len for processor in self._processors_of(name))

    def _processors_of(self, name: str) -> list[Processor]:
        """Of a served model, or of those behind the alias, the most able one first."""
        models = self.alias.models if self.alias is not None and name == self.alias.name else (name,)
        if not self.processors.keys() >= set(models):
            raise UnknownModel(f"model {name[:100]!r} is not served here; served: {', '.join(self.names)}")
        return [self.processors[model] for model in models]

    @asynccontextmanager
    async def request(self, timeout_s: float) -> AsyncIterator[Meter]:
        """Count one request in and out, and hold it to its deadline.

        Raises:
            Overloaded: too many are in flight.
            DeadlineExceeded: it took longer.
        """
        with self.traffic.request() as meter:
            try:
                async with asyncio.timeout(timeout_s) as deadline:
                    yield meter
            except TimeoutError:
                if not deadline.expired():
                    raise
                raise DeadlineExceeded(f"the answer was not finished within {timeout_s:g} s") from None

    async def run(self, work: Callable[[], T], is_small: bool, *, has_media: bool = False) -> T:
        """Result of `work`, done here when it is small, else in a thread; the rest as of `Workers.run`."""
        return work() if is_small else await self.workers.run(work, has_media=has_media)

    def card(self, name: str) -> dict[str, object]:
        return model_card(name, self.created, self.max_model_len(name))

    async def readiness(self) -> dict[str, object]:
        """`ready`: whether every model can take requests; the rest says why not."""
        try:
            async with asyncio.timeout(STATUS_TIMEOUT_S):
                states = await self.backend.status()
        except TimeoutError:
            return {"ready": False, "detail": f"the backend gave no status within {STATUS_TIMEOUT_S:g} s"}
        is_ready = bool(states) and all(state.is_ready for state in states)
        return {
            "ready": is_ready,
            "models": [{"model": s.name, "ready": s.is_ready, "detail": s.detail} for s in states],
        }
