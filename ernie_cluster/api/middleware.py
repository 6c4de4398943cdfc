"""The outermost layers: each request gets its id, what nobody caught becomes an answer, and headers have a bound."""

from __future__ import annotations

import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ernie_cluster.api.limits import ApiLimits
from ernie_cluster.api.openai import encode
from ernie_cluster.api.status import error_body_at, error_headers, status_of
from ernie_cluster.observe.log import bind_request_id
from ernie_cluster.observe.trace_context import TRACEPARENT, TraceContext, bind_trace

_log = logging.getLogger(__name__)

_VISIBLE_ASCII = re.compile(r"[!-~]{1,128}")


def usable_request_id(given: str) -> str:
    """The client's own where it can be used, else a new one.

    It names nothing inside: a client may use one id for many requests.
    """
    return given if _VISIBLE_ASCII.fullmatch(given) else uuid.uuid4().hex


class Boundary:
    """Log lines and the response bear the ids of the request, see `usable_request_id`, and of its trace, see `TraceContext`.

    Args:
        sample_ratio: share of the requests without a trace of their own that is recorded.
    """

    def __init__(self, app: ASGIApp, sample_ratio: float = 0.0) -> None:
        self._app, self._sample_ratio = app, sample_ratio

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = usable_request_id(Headers(scope=scope).get("x-request-id", ""))
        trace = TraceContext.under(Headers(scope=scope).get(TRACEPARENT, ""), self._sample_ratio)
        is_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal is_started
            if message["type"] == "http.response.start":
                is_started = True
                headers = MutableHeaders(scope=message)
                headers["x-request-id"], headers[TRACEPARENT] = request_id, trace.header()
            await send(message)

        with bind_request_id(request_id), bind_trace(trace):
            try:
                await self._app(scope, receive, send_with_id)
            except Exception as e:
                _log.exception("request failed")
                if is_started:
                    raise  # the server closes the connection: the client must not take a part for the whole
                await send_error(e, send_with_id, scope["path"])


class HeaderLimit:
    """Refuses requests with too many or too large headers, before anything of them is looked at."""

    def __init__(self, app: ASGIApp, limits: ApiLimits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, limits = scope.get("headers", ()), self._limits
        num_bytes = sum(len(name) + len(value) for name, value in headers)
        if scope["type"] != "http" or (len(headers) <= limits.max_headers and num_bytes <= limits.max_header_bytes):
            await self._app(scope, receive, send)
            return
        words = (
            f"{len(headers)} headers of {num_bytes} bytes; the limits are {limits.max_headers} and "
            f"{limits.max_header_bytes} bytes"
        )
        await send_error(HTTPException(431, words), send, scope["path"])


async def send_error(exc: Exception, send: Send, path: str = "") -> None:
    """A whole response, for those who stand outside the app and its handlers; the path says in which API's form."""
    headers = {"content-type": "application/json", **error_headers(exc)}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status_of(exc).http, "headers": raw})
    await send({"type": "http.response.body", "body": encode(error_body_at(path, exc))})
