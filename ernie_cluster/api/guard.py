"""The one door: who may come in, on every route, and what they may use. Knows no file format and no model.

A route is closed unless it is named here, so that a new one cannot be forgotten. What is compared is the path by which
the request is routed, letter for letter.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ernie_cluster.api.guest import ANYBODY, Guest, scope_of
from ernie_cluster.api.keys import KeyRing, given_key, is_key, owner_of
from ernie_cluster.api.middleware import send_error
from ernie_cluster.api.ratelimit import Budget
from ernie_cluster.api.salt import tenant_salt
from ernie_cluster.api.status import status_of
from ernie_cluster.api.traffic import UNKNOWN_MODEL
from ernie_cluster.config.keys import ApiKey
from ernie_cluster.errors import Forbidden, RequestError, Unauthorized
from ernie_cluster.observe.log import bind_caller
from ernie_cluster.observe.metrics import Metrics

_log = logging.getLogger(__name__)

OPEN = frozenset({"/health", "/ready", "/version"})
"""Routes that never need a key."""
ADMIN = frozenset({"/metrics", "/debug/experts"})
"""Routes that need the admin key where there is one, and none where there is not; so do those below `ADMIN_FOLDER`."""
ADMIN_FOLDER = "/admin/"
"""Where operators look around and give orders; without an admin key see `ApiConfig.takes_keyless_orders`."""


def is_admin(path: str) -> bool:
    """Whether a route is for operators."""
    return path in ADMIN or path.startswith(ADMIN_FOLDER)


class Guard:
    """Decides who comes in. Owns the budget of every key on this API replica.

    Args:
        ring: the keys; None lets everybody in.
        admin_sha256: hash of the operators' key, see `is_admin`; None leaves those routes open, but for orders.
        takes_keyless_orders: whether orders are taken where there is no such key.
        isolate_prefix_cache: each key's prompts and pictures are cached for it alone.
        metrics: counts those who are turned away.
        clock: seconds, not running backwards.
        pages: routes beside `OPEN` that never need a key.
    """

    def __init__(
        self,
        ring: KeyRing | None,
        *,
        admin_sha256: str | None,
        takes_keyless_orders: bool = False,
        isolate_prefix_cache: bool,
        metrics: Metrics,
        clock: Callable[[], float],
        pages: Container[str] = (),
    ) -> None:
        self._ring = ring
        self._admin_sha256 = admin_sha256
        self._takes_keyless_orders = takes_keyless_orders
        self._isolate = isolate_prefix_cache
        self._metrics = metrics
        self._clock = clock
        self._pages = pages
        self._budgets: dict[str, Budget] = {}

    def closes(self, path: str) -> bool:
        """Whether a route needs a key."""
        if is_admin(path):
            return self._admin_sha256 is not None
        return path not in OPEN and self._ring is not None

    async def identify(self, scope: Scope) -> Guest:
        """Who sent a request.

        Raises:
            Unauthorized: the route needs a key, and the request bears none of those that open it.
            Forbidden: an order that needs the admin key, where none is configured.
        """
        path = scope["path"]
        if path in OPEN or path in self._pages:
            return ANYBODY
        if is_admin(path):
            if self._admin_sha256 is None:
                self._check_keyless(scope)
            elif not is_key(_key(scope), self._admin_sha256):
                raise _wrong_key()
            return ANYBODY
        if self._ring is None:
            return ANYBODY
        key = owner_of(_key(scope), await self._ring.keys())
        if key is None:
            raise _wrong_key()
        return Guest(key.name, tenant_salt(key.name) if self._isolate else b"", self._budget_of(key))

    def refused(self, error: RequestError) -> None:
        """Count one who was turned away."""
        self._metrics.inc("ernie_request_refused_total", model=UNKNOWN_MODEL, reason=status_of(error).outcome)

    def _check_keyless(self, scope: Scope) -> None:
        if not scope["path"].startswith(ADMIN_FOLDER) or scope["method"] in ("GET", "HEAD"):
            return
        if not self._takes_keyless_orders:
            raise Forbidden(
                "orders need an admin key here: set api.admin_key_sha256, which `ernie-cluster key` prints beside a new key; "
                "without one they are taken only where api.host is a loopback address and clients need no key either"
            )
        if any(
            name == b"origin" for name, _ in scope["headers"]
        ):  # no key stands between its reader and a foreign page
            raise Forbidden(
                "orders from web pages need an admin key: set api.admin_key_sha256 (see `ernie-cluster key`)"
            )

    def _budget_of(self, key: ApiKey) -> Budget | None:
        budget = self._budgets.get(key.name)
        if not key.limits:
            self._budgets.pop(key.name, None)
            return None
        if budget is None:
            budget = self._budgets[key.name] = Budget(key.limits, self._clock)
        elif budget.limits != key.limits:
            budget.resize(key.limits)
        return budget


class Door:
    """ASGI middleware: hands on the requests of guests, with what is left to them on each response."""

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self._app = app
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        guest = ANYBODY

        async def send_with_rest(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *guest.headers()]}
            await send(message)

        try:
            guest = await self._guard.identify(scope)
            if scope["method"] == "POST":  # all else is looking around, and free
                guest.knock()
        except RequestError as e:
            self._guard.refused(e)
            with bind_caller(guest.name):
                _log.info("refused: %s", e)
            await send_error(e, send_with_rest, scope["path"])
            return
        with bind_caller(guest.name):
            await self._app(scope_of(scope, guest), receive, send_with_rest)


def _key(scope: Scope) -> bytes:
    key = given_key(scope["headers"])
    if not key:
        raise Unauthorized("this route needs an API key; send it as Authorization: Bearer KEY or as x-api-key: KEY")
    return key


def _wrong_key() -> Unauthorized:
    return Unauthorized("the API key is not valid here", code="invalid_api_key")
