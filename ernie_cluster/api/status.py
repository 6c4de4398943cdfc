"""What each error looks like on the wire: the one table from our error tree to HTTP, OpenAI and gRPC.

Whatever is not in the tree becomes "internal error", and what broke on our side is not told either: such texts may hold
addresses, paths or other clients' data. The request id leads from the client's words to ours in the log.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException

from ernie_cluster.errors import (
    Aborted,
    ContextTooLong,
    DeadlineExceeded,
    Forbidden,
    InvalidRequest,
    OrderRefused,
    Overloaded,
    RateLimited,
    ReplicaError,
    RequestError,
    SlowClient,
    Unauthorized,
    UnknownModel,
    UnknownReplica,
)
from ernie_cluster.observe.log import bound_request_id

REPLICA_RETRY_AFTER_S = 1.0
"""When to come back after one of our processes broke: about the time in which a request finds another one."""


@dataclass(frozen=True, slots=True)
class Status:
    """How one kind of error is reported."""

    http: int
    type: str
    """OpenAI's `error.type`."""
    grpc: str
    """Name of a `grpc.StatusCode`."""
    outcome: str
    """Label of the request counter."""
    words: str = ""
    """What the client reads; empty: what the error itself says."""


INTERNAL = Status(500, "internal_error", "INTERNAL", "internal_error", "internal error")

TABLE: tuple[tuple[type[Exception], Status], ...] = (  # the first row that fits counts: special errors come first
    (Unauthorized, Status(401, "invalid_request_error", "UNAUTHENTICATED", "unauthorized")),
    (Forbidden, Status(403, "invalid_request_error", "PERMISSION_DENIED", "unauthorized")),
    (UnknownModel, Status(404, "invalid_request_error", "NOT_FOUND", "invalid")),
    (UnknownReplica, Status(404, "invalid_request_error", "NOT_FOUND", "invalid")),
    (OrderRefused, Status(409, "invalid_request_error", "FAILED_PRECONDITION", "invalid")),
    (ContextTooLong, Status(400, "invalid_request_error", "INVALID_ARGUMENT", "invalid")),
    (InvalidRequest, Status(400, "invalid_request_error", "INVALID_ARGUMENT", "invalid")),
    (RateLimited, Status(429, "rate_limit_error", "RESOURCE_EXHAUSTED", "rate_limited")),
    (Overloaded, Status(429, "rate_limit_error", "RESOURCE_EXHAUSTED", "overloaded")),
    (DeadlineExceeded, Status(504, "timeout_error", "DEADLINE_EXCEEDED", "deadline_exceeded")),
    (SlowClient, Status(499, "aborted", "CANCELLED", "slow_client")),
    (Aborted, Status(499, "aborted", "CANCELLED", "aborted")),
    (
        ReplicaError,
        Status(
            503,
            "service_unavailable",
            "UNAVAILABLE",
            "replica_error",
            "a part of the service failed while it worked on the request; send it again",
        ),
    ),
)


def status_of(exc: BaseException) -> Status:
    """The row for an error; `INTERNAL` for all that is not meant for a client's eyes."""
    if isinstance(exc, HTTPException):  # raised by the router (404, 405) and by the body reader (408, 413, 415)
        return Status(exc.status_code, "invalid_request_error", "INVALID_ARGUMENT", "invalid")
    return next((status for kind, status in TABLE if isinstance(exc, kind)), INTERNAL)


def message_of(exc: BaseException) -> str:
    """What the client may read."""
    if words := status_of(exc).words:
        request_id = bound_request_id()
        return f"{words} (request id {request_id})" if request_id else words
    if isinstance(exc, HTTPException):
        return str(exc.detail)
    return str(exc) or type(exc).__name__


def message_with_field(exc: BaseException) -> str:
    """What the client may read, where the field at fault has no place of its own."""
    message = message_of(exc)
    param = exc.param if isinstance(exc, InvalidRequest) else None
    return f"{param}: {message}" if param and param not in message else message


def error_body(exc: BaseException) -> dict[str, Any]:
    """OpenAI's error object, `{"error": {message, type, param, code}}`."""
    return {
        "error": {
            "message": message_of(exc),
            "type": status_of(exc).type,
            "param": getattr(exc, "param", None) if isinstance(exc, InvalidRequest) else None,
            "code": getattr(exc, "code", None) if isinstance(exc, RequestError) else None,
        }
    }


_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""By HTTP status; of the others those from 500 on are an api_error, and the rest an invalid_request_error."""


def anthropic_error(exc: BaseException) -> dict[str, Any]:
    """Anthropic's error object, which has no place for the field at fault but its message."""
    status, message = status_of(exc).http, message_with_field(exc)
    kind = _ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": bound_request_id()}


def error_body_at(path: str, exc: BaseException) -> dict[str, Any]:
    """The error object of the API that a path belongs to."""
    return anthropic_error(exc) if is_anthropic(path) else error_body(exc)


def is_anthropic(path: str) -> bool:
    """Whether a path belongs to Anthropic's API."""
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def error_headers(exc: BaseException) -> dict[str, str]:
    """`Retry-After` in whole seconds, at least 1, for what is worth another try; how to send a key, without one."""
    if isinstance(exc, Overloaded):
        return {"retry-after": str(max(1, math.ceil(exc.retry_after_s)))}
    if isinstance(exc, Unauthorized):
        return {"www-authenticate": 'Bearer realm="ernie_cluster"'}
    if isinstance(exc, ReplicaError):
        return {"retry-after": str(math.ceil(REPLICA_RETRY_AFTER_S))}
    if isinstance(exc, HTTPException):
        return dict(exc.headers or {})  # for example Allow, with a 405
    return {}


def grpc_metadata(exc: BaseException) -> dict[str, str]:
    """Trailing metadata of a call that failed: `retry-after` as over HTTP, and what stands in the body of HTTP's error."""
    error = error_body(exc)["error"]
    found = {
        "retry-after": error_headers(exc).get("retry-after"),
        "error-param": error["param"],
        "error-code": error["code"],
    }
    return {name: _NOT_VISIBLE.sub("?", value) for name, value in found.items() if value}


_NOT_VISIBLE = re.compile(r"[^ -~]")
"""Characters that metadata cannot hold."""
