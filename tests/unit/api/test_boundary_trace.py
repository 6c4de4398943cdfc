"""A request keeps its caller's trace: in its answer, and on every line that is logged for it."""

from __future__ import annotations

import io
import json
import logging

import pytest
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from ernie_cluster.api.middleware import Boundary
from ernie_cluster.observe.log import JsonFormatter

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


async def _break(scope: Scope, receive: Receive, send: Send) -> None:
    raise KeyError("a bug")


def test_an_error_is_logged_and_answered_under_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    monkeypatch.setattr(logging.getLogger("ernie_cluster.api.middleware"), "handlers", [handler])
    headers = {"traceparent": f"00-{TRACE}-{SPAN}-01", "x-request-id": "mine"}
    answer = TestClient(Boundary(_break)).get("/v1/models", headers=headers)
    version, trace_id, span_id, flags = answer.headers["traceparent"].split("-")
    assert (answer.status_code, version, trace_id, flags) == (500, "00", TRACE, "01")
    assert span_id != SPAN
    line = json.loads(stream.getvalue())
    assert (line["level"], line["request_id"], line["trace_id"]) == ("ERROR", "mine", TRACE)
