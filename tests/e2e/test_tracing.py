"""One request about a picture is one trace, with every stage of its way, at a collector."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.e2e.application import CHAT, Application, chat_body, eventually

pb2 = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")

TRACE, CALLER = "5e" * 16, "0c" * 8
STAGES = {"preprocess", "route", "encode", "embeddings", "queue", "prefill", "transfer", "decode"}


class Collector(ThreadingHTTPServer):
    """Keeps the spans that are posted to it."""

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.spans: list[Any] = []

    def of(self, trace_id: str) -> list[Any]:
        return [span for span in self.spans if span.trace_id.hex() == trace_id]


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            import gzip

            body = gzip.decompress(body)
        request = pb2.ExportTraceServiceRequest.FromString(body)
        assert isinstance(self.server, Collector)
        self.server.spans += [s for r in request.resource_spans for scope in r.scope_spans for s in scope.spans]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def collector(app: Application) -> Iterator[Collector]:
    tracing = app.config.api.tracing
    assert tracing is not None
    port = urlsplit(tracing.endpoint).port
    assert port is not None
    with Collector(port) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_request_about_a_picture_is_one_trace_with_all_its_stages(app: Application, collector: Collector) -> None:
    body = chat_body("tiny", "What is there?", picture=71, max_tokens=8)
    silent = app.post(body)  # of a caller without a trace, of whom nothing is recorded here
    assert silent.headers["traceparent"].endswith("-00")
    body = chat_body("tiny", "What else is there?", picture=72, max_tokens=8)
    given = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
    answer = httpx.post(app.url + CHAT, json=body, headers=given, timeout=120)
    assert answer.status_code == 200, answer.text
    version, trace_id, span_id, flags = answer.headers["traceparent"].split("-")
    assert (version, trace_id, flags) == ("00", TRACE, "01")
    eventually(lambda: "" if collector.of(TRACE) else "no span has come", 30)
    (root,) = [span for span in collector.spans if span.parent_span_id.hex() == CALLER]
    stages = [span for span in collector.of(TRACE) if span is not root]
    assert (root.span_id.hex(), root.name) == (span_id, "chat tiny")
    assert {span.name for span in stages} >= STAGES
    assert {span.parent_span_id for span in stages} == {root.span_id}
    slack_ns = 50_000_000
    for span in stages:
        assert root.start_time_unix_nano - slack_ns <= span.start_time_unix_nano, span
        assert span.end_time_unix_nano <= root.end_time_unix_nano + slack_ns, span
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE}
