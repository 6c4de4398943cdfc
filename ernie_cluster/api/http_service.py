"""The HTTP face: OpenAI's routes over a `Backend`, and what operators ask for. Knows no Ray and no tensor.

A generation request goes: read body -> parse (thread) -> find model -> prepare (thread) -> run -> write. All of it
stands in `Exchange.__call__`, under one deadline and one watch over the client's presence.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from importlib.metadata import version
from typing import TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from ernie_cluster.api.answer import Answer
from ernie_cluster.api.backend import Backend
from ernie_cluster.api.body import parse_object, read_body
from ernie_cluster.api.limits import ApiLimits
from ernie_cluster.api.middleware import Boundary
from ernie_cluster.api.openai import CHAT, COMPLETION, Form, Heading, encode, model_card, sse
from ernie_cluster.api.prepare import Job, prepare
from ernie_cluster.api.processor import Processor
from ernie_cluster.api.schemas import GenerationBody, parse_body
from ernie_cluster.api.status import INTERNAL, error_body, error_headers, status_of
from ernie_cluster.api.stream import Presentation, write_stream, write_whole
from ernie_cluster.api.traffic import Meter, Traffic
from ernie_cluster.api.wire import Wire, unless_disconnected
from ernie_cluster.api.workers import Workers
from ernie_cluster.errors import Aborted, DeadlineExceeded, ErnieClusterError, UnknownModel
from ernie_cluster.observe.metrics import Metrics
from ernie_cluster.request import Span

T = TypeVar("T")

_log = logging.getLogger(__name__)

STATUS_TIMEOUT_S = 2.0
"""A backend that does not say how it is within this is not ready."""

LAST_WORD_TIMEOUT_S = 5.0
"""For the error event that ends a stream."""

INLINE_BYTES = 4096
"""A body up to this, without media, is read and prepared on the event loop: two hops to a thread cost 1.5 ms there
and back, the work itself under one."""


def create_app(backend: Backend, processors: Mapping[str, Processor], limits: ApiLimits, metrics: Metrics) -> FastAPI:
    """The ASGI app.

    Args:
        backend: serves the requests; closed when the app shuts down.
        processors: by served model name.
        limits: what a client may ask for.
        metrics: where measurements go, and what `/metrics` shows.
    """
    service = Service(backend, processors, limits, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.workers.close()
        await backend.close()

    app = FastAPI(title="ernie_cluster", openapi_url=None, redirect_slashes=False, lifespan=lifespan)
    app.add_middleware(Boundary)
    for kind in (HTTPException, RequestValidationError, ErnieClusterError):
        app.add_exception_handler(kind, _on_error)

    @app.post("/v1/chat/completions")
    async def chat_completions() -> Response:
        return Exchange(service, CHAT)

    @app.post("/v1/completions")
    async def completions() -> Response:
        return Exchange(service, COMPLETION)

    @app.get("/v1/models")
    async def models() -> Response:
        return _json({"object": "list", "data": [service.card(p) for p in processors.values()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return _json(service.card(service.processor(name)))

    @app.get("/health")
    async def health() -> Response:
        return _json({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        return await service.readiness()

    @app.get("/metrics")
    async def render_metrics() -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version")
    async def show_version() -> Response:
        return _json({"version": version("ernie-cluster")})

    return app


class Service:
    """What all requests share."""

    def __init__(
        self, backend: Backend, processors: Mapping[str, Processor], limits: ApiLimits, metrics: Metrics
    ) -> None:
        self.backend = backend
        self.processors = processors
        self.limits = limits
        self.workers = Workers(limits.preprocess_threads, limits.max_preparing)
        self.traffic = Traffic(metrics, time.monotonic, limits.max_in_flight)
        self._created = int(time.time())

    def processor(self, name: str) -> Processor:
        """Raises UnknownModel, naming those that are served."""
        if name not in self.processors:
            raise UnknownModel(f"model {name[:100]!r} is not served here; served: {', '.join(self.processors)}")
        return self.processors[name]

    async def run(self, work: Callable[[], T], is_small: bool) -> T:
        """Result of `work`, done here when it is small, else in a thread; raises as `Workers.run` does."""
        return work() if is_small else await self.workers.run(work)

    def card(self, processor: Processor) -> dict[str, object]:
        return model_card(processor.served_name, self._created, processor.max_model_len)

    async def readiness(self) -> Response:
        """200 when every model can take requests, else 503 with the reasons."""
        try:
            async with asyncio.timeout(STATUS_TIMEOUT_S):
                states = await self.backend.status()
        except TimeoutError:
            return _json({"ready": False, "detail": f"the backend gave no status within {STATUS_TIMEOUT_S:g} s"}, 503)
        is_ready = bool(states) and all(state.is_ready for state in states)
        models = [{"model": s.name, "ready": s.is_ready, "detail": s.detail} for s in states]
        return _json({"ready": is_ready, "models": models}, 200 if is_ready else 503)


class Exchange(Response):
    """One generation request, from the first byte of its body to the last of its answer."""

    def __init__(self, service: Service, form: Form) -> None:
        self._service = service
        self._form = form
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, wire = self._service, Wire(send)
        try:
            with service.traffic.request() as meter:
                try:
                    async with asyncio.timeout(service.limits.request_timeout_s) as deadline:
                        body = await read_body(scope, receive, service.limits)
                        await unless_disconnected(receive, self._answer(body, wire, meter))
                except TimeoutError:
                    if not deadline.expired():
                        raise
                    raise DeadlineExceeded(
                        f"the answer was not finished within {service.limits.request_timeout_s:g} s"
                    ) from None
        except Exception as e:
            if wire.is_broken:
                return
            if not wire.is_stream_open:
                raise  # the handlers of the app make it a response
            _log_error(e)
            with suppress(Aborted, TimeoutError):  # who has left, or reads no more, misses nothing
                async with asyncio.timeout(LAST_WORD_TIMEOUT_S):
                    await wire.write_events(sse(error_body(e)), is_last=True)

    async def _answer(self, raw: bytes, wire: Wire, meter: Meter) -> None:
        service = self._service
        start_s = time.time()
        is_small = len(raw) <= INLINE_BYTES and b"data:" not in raw
        body = await service.run(partial(self._parse, raw), is_small)
        del raw
        processor = service.processor(body.model)
        meter.accept(body.model)
        heading = Heading(self._form.id_prefix + uuid.uuid4().hex, int(start_s), body.model)
        job = await service.run(partial(self._prepare, body, processor, heading, meter), is_small)
        del body
        meter.prepared(job.num_prompt_tokens)
        own_spans = [Span("preprocess", start_s, time.time() - start_s)]
        look = Presentation(self._form, heading, job, own_spans)
        async with Answer(service.backend, job, processor) as answer:
            if job.is_stream:
                await write_stream(wire, answer, look, meter, lambda: service.traffic.num_streams)
            else:
                await write_whole(wire, answer, look, meter)
            meter.cached(answer.num_cached_tokens)

    def _parse(self, raw: bytes) -> GenerationBody:
        return parse_body(self._form.body, parse_object(raw, self._service.limits))

    def _prepare(self, body: GenerationBody, processor: Processor, heading: Heading, meter: Meter) -> Job:
        limits = self._service.limits
        return prepare(
            body,
            processor,
            limits,
            response_id=heading.response_id,
            seed=secrets.randbits(63),
            timeout_s=max(0.001, limits.request_timeout_s - (time.monotonic() - meter.start_s)),
        )


def _json(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(encode(value), status, headers=headers, media_type="application/json")


async def _on_error(_: Request, exc: Exception) -> Response:
    _log_error(exc)
    return _json(error_body(exc), status_of(exc).http, error_headers(exc))


def _log_error(exc: Exception) -> None:
    """Faults of ours with their trace; all others in a line."""
    if status_of(exc) is INTERNAL:
        _log.error("request failed", exc_info=exc)
    else:
        _log.info("request failed: %s", exc)
