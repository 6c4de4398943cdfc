"""The HTTP face: routes of several APIs over a `Backend`, and what operators ask for. Knows no Ray and no tensor."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import asdict
from functools import cache, partial
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import Scope

from ernie_cluster.api.admin import add_admin
from ernie_cluster.api.alias import Alias
from ernie_cluster.api.anthropic import MESSAGES
from ernie_cluster.api.backend import Backend
from ernie_cluster.api.body import parse_object
from ernie_cluster.api.exchange import Exchange, log_error
from ernie_cluster.api.fetcher import Fetcher
from ernie_cluster.api.gauges import ReplicaGauges
from ernie_cluster.api.generation import Generation, Lookup, Work
from ernie_cluster.api.guard import Door, Guard
from ernie_cluster.api.image_search import ImageSearcher
from ernie_cluster.api.limits import ApiLimits
from ernie_cluster.api.middleware import Boundary, HeaderLimit
from ernie_cluster.api.openai import CHAT, COMPLETION, encode
from ernie_cluster.api.openapi import document
from ernie_cluster.api.processor import Processor
from ernie_cluster.api.responses import RESPONSES
from ernie_cluster.api.service import Service, json_response
from ernie_cluster.api.status import error_body_at, error_headers, status_of
from ernie_cluster.api.tokens import Query, count_tokens, detokenize, tokenize
from ernie_cluster.api.tracing import Tracer
from ernie_cluster.api.unknown import Exacting, JsonDialect, wants_strict
from ernie_cluster.errors import ErnieClusterError
from ernie_cluster.observe.metrics import Metrics

DIALECTS: Mapping[str, JsonDialect] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETION,
    "/v1/responses": RESPONSES,
    "/v1/messages": MESSAGES,
}
"""Routes on which models answer."""

QUERIES: Mapping[str, Query] = {
    "/v1/messages/count_tokens": count_tokens,
    "/tokenize": tokenize,
    "/detokenize": detokenize,
}
"""Routes on which no model runs."""


def create_app(
    backend: Backend,
    processors: Mapping[str, Processor],
    limits: ApiLimits,
    metrics: Metrics,
    guard: Guard | None = None,
    fetcher: Fetcher | None = None,
    default_tools: Sequence[str] = (),
    searcher: ImageSearcher | None = None,
    beside: Callable[[Service], AbstractAsyncContextManager[object]] | None = None,
    alias: Alias | None = None,
    tracer: Tracer | None = None,
) -> FastAPI:
    """The ASGI app.

    Args:
        backend: serves the requests; closed when the app shuts down.
        processors: by served model name.
        limits: what a client may ask for.
        metrics: where measurements go, and what `/metrics` shows.
        guard: who may come in; None lets everybody in.
        fetcher: of media that are named by URL; None fetches nothing. Closed when the app shuts down.
        default_tools: of our own, offered in chats that say nothing of tools.
        searcher: of the tool `image_search`; None does not offer it.
        beside: another face of the same service, there as long as the app runs.
        alias: a name that stands for several of the models.
        tracer: takes the spans of requests; None records none. Closed when the app shuts down.
    """
    service = Service(backend, processors, limits, metrics, fetcher, default_tools, searcher, alias, tracer)
    gauges = ReplicaGauges(backend, metrics, time.monotonic)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with nullcontext() if beside is None else beside(service):
            yield
        service.workers.close()
        await service.fetcher.close()
        await backend.close()
        await asyncio.to_thread(service.tracer.close)

    app = FastAPI(title="ernie_cluster", openapi_url=None, redirect_slashes=False, lifespan=lifespan)
    if guard is not None:
        app.add_middleware(Door, guard=guard)
    app.add_middleware(HeaderLimit, limits=limits)
    app.add_middleware(Boundary, sample_ratio=service.tracer.sample_ratio)  # the last one added is the outermost
    for kind in (HTTPException, RequestValidationError, ErnieClusterError):
        app.add_exception_handler(kind, _on_error)

    for path, dialect in DIALECTS.items():
        app.post(path)(_endpoint(service, partial(_generation, service, dialect)))
    for path, query in QUERIES.items():
        app.post(path)(_endpoint(service, partial(_lookup, service, query)))

    @app.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [service.card(name) for name in service.names]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return json_response(service.card(name))

    @app.get("/health")
    async def health() -> Response:
        return json_response({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        state = await service.readiness()
        return json_response(state, 200 if state["ready"] else 503)

    @app.get("/metrics")
    async def render_metrics() -> Response:
        service.traffic.refresh()
        await gauges.refresh()
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/debug/experts")
    async def experts() -> Response:
        return json_response({"object": "list", "data": [asdict(replica) for replica in await backend.experts()]})

    add_admin(app, backend, limits)

    @app.get("/version")
    async def show_version() -> Response:
        return json_response({"version": version("ernie-cluster")})

    @cache
    def description() -> bytes:
        return encode(document(version("ernie-cluster"), lambda path: guard is not None and guard.closes(path)))

    @app.get("/openapi.json")
    async def show_description() -> Response:
        return Response(await asyncio.to_thread(description), media_type="application/json")

    return app


def _endpoint(service: Service, work: Callable[[Scope], Work]) -> Callable[[Request], Awaitable[Response]]:
    """A route's function; the response does the work itself."""

    async def endpoint(request: Request) -> Response:
        return Exchange(service, work(request.scope))

    return endpoint


def _generation(service: Service, dialect: JsonDialect, scope: Scope) -> Work:
    return Generation(service, Exacting(dialect) if wants_strict(scope) else dialect, parse_object)


def _lookup(service: Service, query: Query, scope: Scope) -> Work:
    return Lookup(service, partial(_answer, service, query))


def _answer(service: Service, query: Query, raw: bytes) -> dict[str, Any]:
    return query(parse_object(raw, service.limits), service.processor)


async def _on_error(request: Request, exc: Exception) -> Response:
    log_error(exc)
    return json_response(error_body_at(request.scope["path"], exc), status_of(exc).http, error_headers(exc))
