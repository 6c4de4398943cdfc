"""The outermost layer: gives each request its id, and turns what nobody caught into an answer."""

from __future__ import annotations

import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ernie_cluster.api.openai import encode
from ernie_cluster.api.status import error_body, error_headers, status_of
from ernie_cluster.observe.log import bind_request_id

_log = logging.getLogger(__name__)

_VISIBLE_ASCII = re.compile(r"[!-~]{1,128}")


class Boundary:
    """Takes the client's `x-request-id` where it is usable, else makes one; log lines and the response bear it.

    It names nothing inside: a client may use one id for many requests.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _VISIBLE_ASCII.fullmatch(given) else uuid.uuid4().hex
        is_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal is_started
            if message["type"] == "http.response.start":
                is_started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        with bind_request_id(request_id):
            try:
                await self._app(scope, receive, send_with_id)
            except Exception as e:
                _log.exception("request failed")
                if is_started:
                    raise  # the server closes the connection: the client must not take a part for the whole
                await _send_error(e, send_with_id)


async def _send_error(exc: Exception, send: Send) -> None:
    headers = {"content-type": "application/json", **error_headers(exc)}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status_of(exc).http, "headers": raw})
    await send({"type": "http.response.body", "body": encode(error_body(exc))})
