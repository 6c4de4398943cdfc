"""What each error looks like on the wire: the one table from our error tree to HTTP, OpenAI and gRPC.

Whatever is not in the tree becomes "internal error": its text may hold addresses, paths or other clients' data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException

from ernie_cluster.errors import (
    Aborted,
    ContextTooLong,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    ReplicaError,
    UnknownModel,
)

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


INTERNAL = Status(500, "internal_error", "INTERNAL", "internal_error")

TABLE: tuple[tuple[type[Exception], Status], ...] = (  # the first row that fits counts: special errors come first
    (UnknownModel, Status(404, "invalid_request_error", "NOT_FOUND", "invalid")),
    (ContextTooLong, Status(400, "invalid_request_error", "INVALID_ARGUMENT", "invalid")),
    (InvalidRequest, Status(400, "invalid_request_error", "INVALID_ARGUMENT", "invalid")),
    (Overloaded, Status(429, "rate_limit_error", "RESOURCE_EXHAUSTED", "overloaded")),
    (DeadlineExceeded, Status(504, "timeout_error", "DEADLINE_EXCEEDED", "deadline_exceeded")),
    (Aborted, Status(499, "aborted", "CANCELLED", "aborted")),
    (ReplicaError, Status(503, "service_unavailable", "UNAVAILABLE", "replica_error")),
)


def status_of(exc: BaseException) -> Status:
    """The row for an error; `INTERNAL` for all that is not meant for a client's eyes."""
    if isinstance(exc, HTTPException):  # raised by the router (404, 405) and by the body reader (408, 413, 415)
        return Status(exc.status_code, "invalid_request_error", "INVALID_ARGUMENT", "invalid")
    return next((status for kind, status in TABLE if isinstance(exc, kind)), INTERNAL)


def message_of(exc: BaseException) -> str:
    """What the client may read."""
    if status_of(exc) is INTERNAL:
        return "internal error"
    if isinstance(exc, HTTPException):
        return str(exc.detail)
    return str(exc) or type(exc).__name__


def error_body(exc: BaseException) -> dict[str, Any]:
    """OpenAI's error object, `{"error": {message, type, param, code}}`."""
    return {
        "error": {
            "message": message_of(exc),
            "type": status_of(exc).type,
            "param": getattr(exc, "param", None) if isinstance(exc, InvalidRequest) else None,
            "code": exc.code if isinstance(exc, InvalidRequest) else None,
        }
    }


def error_headers(exc: BaseException) -> dict[str, str]:
    """`Retry-After` in whole seconds, at least 1, for what is worth another try."""
    if isinstance(exc, Overloaded):
        return {"retry-after": str(max(1, math.ceil(exc.retry_after_s)))}
    if isinstance(exc, ReplicaError):
        return {"retry-after": str(math.ceil(REPLICA_RETRY_AFTER_S))}
    if isinstance(exc, HTTPException):
        return dict(exc.headers or {})  # for example Allow, with a 405
    return {}
