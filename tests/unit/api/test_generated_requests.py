"""Requests that schemathesis makes of `/openapi.json`: those that fit it, and those that do not.

No answer is a fault of ours, each is of a status, type and shape that the document tells of, and a request that does not
fit is refused.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from ernie_cluster.api import constraints
from ernie_cluster.api.openapi import document
from ernie_cluster.api.routes import OPERATIONS, Operation
from tests.unit.api.client import Server

FEW, MANY = 6, 300
"""Examples per route and kind; the many are for `--slow`."""

WITH_BODY = [operation for operation in OPERATIONS if operation.body is not None]


@pytest.fixture(scope="module")
def described() -> dict[str, Any]:
    """The document, narrowed to the one model that is served: else nothing would come further than its name."""
    whole: dict[str, Any] = json.loads(json.dumps(document("1", lambda path: False)))
    for name, schema in whole["components"]["schemas"].items():
        if name.endswith("Body"):
            schema["properties"]["model"] = {"const": "tiny"}
    return whole


@pytest.fixture(scope="module")
def server() -> Server:
    return Server()


def try_out(server: Server, described: dict[str, Any], operation: Operation, mode: str, max_examples: int) -> None:
    import schemathesis
    from schemathesis import GenerationMode
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    schema = schemathesis.openapi.from_dict(described)
    schema.app = server.app
    held = [
        not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
        checks.response_headers_conformance,
        checks.negative_data_rejection,
    ]

    @settings(
        max_examples=max_examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(schema[operation.path][operation.method].as_strategy(GenerationMode(mode)))
    def holds(case: Any) -> None:
        case.call_and_validate(checks=held)

    holds()
    assert server.metrics.value("ernie_requests_in_flight", model="tiny") == 0
    assert server.metrics.value("ernie_requests_in_flight", model="unknown") == 0


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_fitting_requests(
    operation: Operation, server: Server, described: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constraints, "check", lambda text: None)  # a process for each would take its time
    try_out(server, described, operation, "positive", FEW)


@pytest.mark.parametrize("operation", WITH_BODY, ids=lambda operation: operation.name)
def test_other_requests(
    operation: Operation, server: Server, described: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constraints, "check", lambda text: None)
    try_out(server, described, operation, "negative", FEW)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize("operation", WITH_BODY, ids=lambda operation: operation.name)
def test_many_requests(operation: Operation, mode: str, server: Server, described: dict[str, Any]) -> None:
    try_out(server, described, operation, mode, MANY)
