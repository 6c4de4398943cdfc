"""The table from errors to HTTP, OpenAI and gRPC."""

from __future__ import annotations

import inspect

import grpc
import pytest

from ernie_cluster import errors
from ernie_cluster.api.status import INTERNAL, TABLE, error_body, error_headers, status_of
from ernie_cluster.errors import (
    Aborted,
    ConfigError,
    ContextTooLong,
    DeadlineExceeded,
    EngineFailed,
    Forbidden,
    InvalidRequest,
    OrderRefused,
    Overloaded,
    RateLimited,
    ReplicaError,
    ReplicaLost,
    RequestError,
    TransferFailed,
    Unauthorized,
    UnknownModel,
    UnknownReplica,
)
from ernie_cluster.observe.log import bind_request_id


@pytest.mark.parametrize(
    ("error", "http", "grpc_code"),
    [
        (InvalidRequest("bad", "n"), 400, "INVALID_ARGUMENT"),
        (Unauthorized("no key"), 401, "UNAUTHENTICATED"),
        (Forbidden("not set"), 403, "PERMISSION_DENIED"),
        (UnknownModel("none"), 404, "NOT_FOUND"),
        (UnknownReplica("none"), 404, "NOT_FOUND"),
        (OrderRefused("no pool"), 409, "FAILED_PRECONDITION"),
        (ContextTooLong("long"), 400, "INVALID_ARGUMENT"),
        (Overloaded("full", 2.0), 429, "RESOURCE_EXHAUSTED"),
        (RateLimited("used up", 2.0), 429, "RESOURCE_EXHAUSTED"),
        (DeadlineExceeded("late"), 504, "DEADLINE_EXCEEDED"),
        (Aborted("gone"), 499, "CANCELLED"),
        (ReplicaLost("lost"), 503, "UNAVAILABLE"),
        (TransferFailed("torn"), 503, "UNAVAILABLE"),
        (EngineFailed("broken"), 503, "UNAVAILABLE"),
        (ConfigError("/etc/secret"), 500, "INTERNAL"),
        (KeyError("secret"), 500, "INTERNAL"),
    ],
)
def test_each_error_has_its_codes(error: Exception, http: int, grpc_code: str) -> None:
    status = status_of(error)
    assert (status.http, status.grpc) == (http, grpc_code)


def test_every_error_of_a_request_is_in_the_table() -> None:
    tree = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
    concrete = [k for k in tree if issubclass(k, (RequestError, ReplicaError)) and k is not RequestError]
    assert len(concrete) >= 10
    assert [k for k in concrete if not any(issubclass(k, row) for row, _ in TABLE)] == []


def test_grpc_names_exist() -> None:
    assert {status.grpc for _, status in TABLE} | {INTERNAL.grpc} <= {code.name for code in grpc.StatusCode}


def test_error_body_names_message_type_param_and_code() -> None:
    assert error_body(ContextTooLong("9 > 8", "prompt")) == {
        "error": {
            "message": "9 > 8",
            "type": "invalid_request_error",
            "param": "prompt",
            "code": "context_length_exceeded",
        }
    }


def test_what_is_not_ours_tells_nothing() -> None:
    body = error_body(ValueError("/home/somebody at 0x7f12"))
    assert body == {"error": {"message": "internal error", "type": "internal_error", "param": None, "code": None}}


@pytest.mark.parametrize("error", [ValueError, ConfigError, ReplicaLost, EngineFailed, TransferFailed, ReplicaError])
def test_what_broke_on_our_side_tells_only_where_the_log_has_it(error: type[Exception]) -> None:
    exc = error("File /home/somebody, line 3: 10.0.0.7:4242 at 0x7f12")
    with bind_request_id("req-1"):
        message = error_body(exc)["error"]["message"]
    assert "(request id req-1)" in message
    assert not any(word in message for word in ("/home", "line", "10.0", "0x7f"))


def test_codes_that_programs_read() -> None:
    assert error_body(Unauthorized("no", code="invalid_api_key"))["error"]["code"] == "invalid_api_key"
    assert error_body(RateLimited("used up"))["error"]["code"] == "rate_limit_exceeded"
    assert error_body(Overloaded("full"))["error"]["code"] is None


def test_without_a_key_the_way_to_send_one_is_told() -> None:
    assert error_headers(Unauthorized("no"))["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize(("seconds", "header"), [(0.0, "1"), (0.2, "1"), (1.0, "1"), (1.01, "2"), (30, "30")])
def test_retry_after_is_whole_seconds_rounded_up_and_at_least_one(seconds: float, header: str) -> None:
    assert error_headers(Overloaded("full", seconds)) == {"retry-after": header}


def test_a_broken_replica_invites_a_retry_and_a_bad_request_does_not() -> None:
    assert int(error_headers(ReplicaLost("lost"))["retry-after"]) >= 1
    assert error_headers(InvalidRequest("bad")) == {}
