"""From an ASGI body to plain JSON values, within limits. Trusts nothing that it reads."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope

from ernie_cluster.api.limits import ApiLimits
from ernie_cluster.api.validate import param_of
from ernie_cluster.errors import Aborted, InvalidRequest

_OBJECT = TypeAdapter(dict[str, Any])
"""Parses in Rust: without deep recursion, and refusing half surrogate pairs, which no tokenizer could take."""


def check_headers(headers: Headers, limits: ApiLimits) -> None:
    """Refuse a body by its headers, before a byte of it is read.

    The content type is insisted on because a foreign web page may send any other one to a server on the reader's own
    machine without being asked.

    Raises:
        HTTPException: 413 too large, 415 not plain JSON.
    """
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise HTTPException(415, f"content-type is {media_type[:100]!r}; send application/json")
    encoding = headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise HTTPException(415, f"content-encoding {encoding[:100]!r} is not supported; send the body as it is")
    length = headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit() or len(length) > 18 or int(length) > limits.max_body_bytes:
        raise _too_large(limits)


async def read_body(
    scope: Scope, receive: Receive, limits: ApiLimits, took: Callable[[int], None] = lambda _: None
) -> bytes:
    """The whole body.

    Args:
        took: is told how many bytes have come, for each piece; what it raises ends the reading.

    Raises:
        HTTPException: 413 too large, 415 not JSON, 408 not there in time.
        Aborted: the client left.
    """
    check_headers(Headers(scope=scope), limits)
    pieces: list[bytes] = []
    num_bytes = 0
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Aborted("the client left before its request was read")
                piece = message.get("body", b"")
                num_bytes += len(piece)
                if num_bytes > limits.max_body_bytes:
                    raise _too_large(limits)
                if piece:
                    took(len(piece))
                    pieces.append(piece)
                if not message.get("more_body", False):
                    return b"".join(pieces)
    except TimeoutError:
        raise HTTPException(
            408, f"{num_bytes} bytes of the body arrived in {limits.body_timeout_s:g} s, but not its end"
        ) from None


def parse_object(body: bytes, limits: ApiLimits) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        InvalidRequest: not JSON, not an object, nested too deeply, or with too many items; a number that no float
            holds is named.
    """
    num_items = sum(body.count(mark) for mark in (b"[", b"{", b","))
    if num_items > limits.max_json_items:
        raise InvalidRequest(f"the body has {num_items} list and object items; the limit is {limits.max_json_items}")
    try:
        value = _OBJECT.validate_json(body)
    except ValidationError as e:
        raise InvalidRequest(f"the body is not a JSON object: {e.errors()[0]['msg']}", code="invalid_json") from None
    if not _depth_fits(value, limits.max_json_depth):
        raise InvalidRequest(f"the body is nested deeper than {limits.max_json_depth} levels", code="invalid_json")
    path = _path_to_no_number(value)
    if path is not None:
        param = param_of(path)
        raise InvalidRequest(f"{param} is no finite number; JSON has neither NaN nor Infinity", param, "invalid_json")
    return value


def _depth_fits(value: dict[str, Any], max_depth: int) -> bool:
    """Level by level, without recursion: `{}` has depth 1."""
    level: list[Any] = [value]
    for _ in range(max_depth):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return True
    return False


def _path_to_no_number(value: Any) -> Sequence[int | str] | None:
    """Where NaN or an infinity stands, which would make an answer that repeats it no JSON. As deep as `_depth_fits`."""
    if isinstance(value, float):
        return None if math.isfinite(value) else ()
    if not isinstance(value, (dict, list)):
        return None
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        path = _path_to_no_number(inner)
        if path is not None:
            return (key, *path)
    return None


def _too_large(limits: ApiLimits) -> HTTPException:
    return HTTPException(413, f"the body is larger than {limits.max_body_bytes} bytes; send fewer or smaller pictures")
