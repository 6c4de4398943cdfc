"""Logging: one line per record, with the request that it belongs to.

Request id and caller travel in context variables, which follow `await` and new tasks by themselves. Reads no environment: the
entry point hands in level and format, usually those of ERNIE_LOG_LEVEL and ERNIE_LOG_FORMAT.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TextIO

from ernie_cluster.observe.trace_context import bound_trace

ENV_LEVEL = "ERNIE_LOG_LEVEL"
ENV_FORMAT = "ERNIE_LOG_FORMAT"
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


class JsonFormatter(LineFormatter):
    """One JSON object per line: time, level, logger, message, and where they are known request_id, caller, trace_id, exception."""

    def format(self, record: logging.LogRecord) -> str:
        trace = bound_trace()
        fields = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": bound_request_id(),
            "caller": _caller.get(),
            "trace_id": "" if trace is None else trace.trace_id,
            "exception": self.formatException(record.exc_info) if record.exc_info else "",
        }
        return json.dumps({name: value for name, value in fields.items() if value or name == "message"})


FORMATS: Mapping[str, Callable[[], logging.Formatter]] = {"text": LineFormatter, "json": JsonFormatter}


def setup_logging(level: str = "INFO", stream: TextIO | None = None, form: str = "text") -> logging.Logger:
    """Send records of `ernie_cluster` to a stream (standard error by default); calling again replaces the last setup.

    Raises:
        ValueError: no such level, or no such format.
    """
    if form.lower() not in FORMATS:
        raise ValueError(f"log format {form!r} must be one of {', '.join(FORMATS)}")
    if level.upper() not in LEVELS:
        raise ValueError(f"log level {level!r} must be one of {', '.join(LEVELS)}")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(FORMATS[form.lower()]())
    logger = logging.getLogger("ernie_cluster")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False
    return logger
