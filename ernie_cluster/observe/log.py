"""Logging: one line per record, with the request that it belongs to.

Request id and caller travel in context variables, which follow `await` and new tasks by themselves. Reads no environment: the
entry point hands in the level, usually that of ERNIE_LOG_LEVEL.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import time
from collections.abc import Iterator
from typing import TextIO

ENV_LEVEL = "ERNIE_LOG_LEVEL"
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

_request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="-")
_caller: contextvars.ContextVar[str] = contextvars.ContextVar("caller", default="")


@contextlib.contextmanager
def bind_request_id(request_id: str) -> Iterator[None]:
    """Put this id on every line that is logged inside."""
    token = _request_id.set(request_id)
    try:
        yield
    finally:
        _request_id.reset(token)


def bound_request_id() -> str:
    """The id that `bind_request_id` has bound here, or ""."""
    request_id = _request_id.get()
    return "" if request_id == "-" else request_id


@contextlib.contextmanager
def bind_caller(name: str) -> Iterator[None]:
    """Put the name of the caller's key, if it has one, on every line that is logged inside."""
    token = _caller.set(name)
    try:
        yield
    finally:
        _caller.reset(token)


class LineFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.250Z INFO ernie_cluster.actors.router [req-1] message`, tracebacks and line breaks escaped.

    With a caller's name it is `[req-1 alice]`. Escaping keeps a client's text from forging a line.
    """

    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s [%(origin)s] %(message)s")
        self.converter = time.gmtime

    def format(self, record: logging.LogRecord) -> str:
        record.origin = f"{_request_id.get()} {_caller.get()}".rstrip()
        return super().format(record).translate(_BREAKS)


_BREAKS = {ord(c): c.encode("unicode_escape").decode() for c in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029\x1b"}


def setup_logging(level: str = "INFO", stream: TextIO | None = None) -> logging.Logger:
    """Send records of `ernie_cluster` to a stream (standard error by default); calling again replaces the last setup.

    Raises:
        ValueError: no such level.
    """
    if level.upper() not in LEVELS:
        raise ValueError(f"log level {level!r} must be one of {', '.join(LEVELS)}")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter())
    logger = logging.getLogger("ernie_cluster")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False
    return logger
