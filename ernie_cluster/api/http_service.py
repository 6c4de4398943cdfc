"""The HTTP face: routes of several APIs over a `Backend`, and what operators ask for. Knows no Ray and no tensor."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from functools import partial
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from ernie_cluster.api.anthropic import MESSAGES
from ernie_cluster.api.backend import Backend
from ernie_cluster.api.body import parse_object
from ernie_cluster.api.dialect import Dialect
from ernie_cluster.api.exchange import Exchange, log_error
from ernie_cluster.api.fetcher import Fetcher
from ernie_cluster.api.generation import Generation, Lookup, Work
from ernie_cluster.api.guard import Door, Guard
from ernie_cluster.api.limits import ApiLimits
from ernie_cluster.api.middleware import Boundary, HeaderLimit
from ernie_cluster.api.openai import CHAT, COMPLETION
from ernie_cluster.api.processor import Processor
from ernie_cluster.api.responses import RESPONSES
from ernie_cluster.api.service import Service, json_response
from ernie_cluster.api.status import error_body_at, error_headers, status_of
from ernie_cluster.api.tokens import Query, count_tokens, detokenize, tokenize
from ernie_cluster.errors import ErnieClusterError
from ernie_cluster.observe.metrics import Metrics

DIALECTS: Mapping[str, Dialect[dict[str, Any]]] = {
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
    beside: Callable[[Service], AbstractAsyncContextManager[object]] | None = None,
) -> FastAPI:
    """The ASGI app.

    Args:
        backend: serves the requests; closed when the app shuts down.
        processors: by served model name.
        limits: what a client may ask for.
        metrics: where measurements go, and what `/metrics` shows.
        guard: who may come in; None lets everybody in.
        fetcher: of media that are named by URL; None fetches nothing. Closed when the app shuts down.
        beside: another face of the same service, there as long as the app runs.
    """
    service = Service(backend, processors, limits, metrics, fetcher)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with nullcontext() if beside is None else beside(service):
            yield
        service.workers.close()
        await service.fetcher.close()
        await backend.close()

    app = FastAPI(title="ernie_cluster", openapi_url=None, redirect_slashes=False, lifespan=lifespan)
    if guard is not None:
        app.add_middleware(Door, guard=guard)
    app.add_middleware(HeaderLimit, limits=limits)
    app.add_middleware(Boundary)  # the last one added is the outermost
    for kind in (HTTPException, RequestValidationError, ErnieClusterError):
        app.add_exception_handler(kind, _on_error)

    for path, dialect in DIALECTS.items():
        app.post(path)(_endpoint(service, partial(Generation, service, dialect, parse_object)))
    for path, query in QUERIES.items():
        app.post(path)(_endpoint(service, partial(Lookup, service, partial(_answer, service, query))))

    @app.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [service.card(p) for p in processors.values()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return json_response(service.card(service.processor(name)))

    @app.get("/health")
    async def health() -> Response:
        return json_response({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        state = await service.readiness()
        return json_response(state, 200 if state["ready"] else 503)

    @app.get("/metrics")
    async def render_metrics() -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version")
    async def show_version() -> Response:
        return json_response({"version": version("ernie-cluster")})

    return app


def _endpoint(service: Service, work: Callable[[], Work]) -> Callable[[], Awaitable[Response]]:
    """A route's function; the response does the work itself."""

    async def endpoint() -> Response:
        return Exchange(service, work())

    return endpoint


def _answer(service: Service, query: Query, raw: bytes) -> dict[str, Any]:
    return query(parse_object(raw, service.limits), service.processor)


async def _on_error(request: Request, exc: Exception) -> Response:
    log_error(exc)
    return json_response(error_body_at(request.scope["path"], exc), status_of(exc).http, error_headers(exc))
