"""`/openapi.json` tells the truth: about every route, what is accepted, what is refused and what comes back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from jsonschema import Draft202012Validator

from ernie_cluster.api.backend import ModelStatus
from ernie_cluster.api.guard import OPEN, Guard, is_admin
from ernie_cluster.api.keys import KeyRing
from ernie_cluster.api.openapi import MEANINGS, document
from ernie_cluster.api.routes import OPERATIONS
from ernie_cluster.errors import Overloaded, ReplicaLost
from ernie_cluster.observe.metrics import InMemoryMetrics
from tests.fakes import FakeBackend, FakeProcessor, say
from tests.unit.api.client import Server, chat_body
from tests.unit.api.clusters import PREFILL, operated
from tests.unit.api.hostile.row import Row
from tests.unit.api.hostile.table import TABLE

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(180)]

PATHS = {operation.path: operation for operation in OPERATIONS}
STREAMS = [operation.path for operation in OPERATIONS if operation.event is not None]
BY_NAME = "/v1/models/{name}"

CALL = 'why</think>Hi<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
TOOL = {"name": "f", "parameters": {"type": "object"}}
CHAT = chat_body(enable_thinking=True, tools=[{"type": "function", "function": TOOL}], logprobs=True, top_logprobs=2)
FULL: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {**CHAT, "n": 2, "include_timeline": True},
    "/v1/completions": {"model": "tiny", "prompt": ["a", [98]], "logprobs": 2, "include_timeline": True},
    "/v1/responses": {
        "model": "tiny",
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "x"}]}],
        "reasoning": {"effort": "high"},
        "tools": [{"type": "function", **TOOL}],
        "metadata": {"a": "b"},
    },
    "/v1/messages": {
        **chat_body(max_tokens=200),
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "tools": [{"name": "f", "input_schema": {"type": "object"}}],
    },
}
"""Requests whose answers have all that an answer can have."""
SMALL: dict[str, dict[str, Any]] = {
    "/v1/messages/count_tokens": chat_body(),
    "/tokenize": {"model": "tiny", "prompt": "x", "return_token_strs": True},
    "/detokenize": {"model": "tiny", "tokens": [65]},
}


@pytest.fixture(scope="module")
def described() -> dict[str, Any]:
    return document("1.2.3", lambda path: False)


def validator(described: dict[str, Any], schema: dict[str, Any], *, is_closed: bool = False) -> Draft202012Validator:
    """Of one schema; `is_closed` lets pass no field that is not told of."""
    components = json.loads(json.dumps(described["components"]))
    if is_closed:
        close(components)
    return Draft202012Validator({**schema, "components": components})


def close(node: Any) -> None:
    if isinstance(node, dict) and "properties" in node:
        node.setdefault("additionalProperties", False)
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        close(inner)


def told(described: dict[str, Any], path: str, status: int = 200, media_type: str = "application/json") -> Any:
    operations = described["paths"][path]
    operation = operations.get("get") or operations["post"]
    return operation["responses"][str(status)]["content"][media_type]


def body_schema(described: dict[str, Any], path: str) -> Any:
    return described["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]


def faults(described: dict[str, Any], schema: dict[str, Any], value: Any, *, is_closed: bool = False) -> list[str]:
    errors = validator(described, schema, is_closed=is_closed).iter_errors(value)
    return [f"{error.json_path}: {error.message}" for error in errors]


def events(response: httpx.Response) -> Iterator[Any]:
    assert response.headers["content-type"].partition(";")[0] == "text/event-stream"
    for line in response.text.splitlines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line[6:])


# The document itself


async def test_it_is_an_openapi_document_and_served(described: dict[str, Any]) -> None:
    from openapi_spec_validator import validate

    validate(described)
    response = await (server := Server()).get("/openapi.json")
    assert response.headers["content-type"] == "application/json"
    assert {**response.json(), "info": None} == {**described, "info": None}
    assert (await server.get("/openapi.json")).content == response.content


def test_every_route_is_told_of_and_no_other() -> None:
    routes = [route for route in Server().app.routes if isinstance(route, APIRoute)]
    served = {(method.lower(), route.path_format) for route in routes for method in route.methods}
    assert served == {(operation.method, operation.path) for operation in OPERATIONS}


def test_every_field_that_is_read_is_told_of(described: dict[str, Any]) -> None:
    for operation in OPERATIONS:
        if operation.body is not None:
            name = body_schema(described, operation.path)["$ref"].rpartition("/")[2]
            fields = {field.alias or field_name for field_name, field in operation.body.model_fields.items()}
            assert described["components"]["schemas"][name]["properties"].keys() >= fields | operation.harmless.keys()


def test_routes_that_need_a_key_say_so(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(json.dumps([{"name": "a", "sha256": hashlib.sha256(b"a").hexdigest()}]))
    metrics = InMemoryMetrics()
    for admin in (None, "0" * 64):
        guard = Guard(
            KeyRing(keys, lambda: 0.0),
            admin_sha256=admin,
            isolate_prefix_cache=False,
            metrics=metrics,
            clock=lambda: 0.0,
        )
        paths = document("1", guard.closes)["paths"]
        closed = {path for path, methods in paths.items() for o in methods.values() if o["security"]}
        assert closed == {path for path in paths.keys() - OPEN if admin or not is_admin(path)}
        assert {p for p, methods in paths.items() for o in methods.values() if "401" in o["responses"]} == closed


# What is accepted and refused


def documented(row: Row) -> bool:
    operation = PATHS.get(row.path.partition("?")[0])
    return operation is not None and operation.method == row.method.lower()


def test_what_is_served_fits_and_what_does_not_fit_is_refused(described: dict[str, Any]) -> None:
    validators = {o.path: validator(described, body_schema(described, o.path)) for o in OPERATIONS if o.body}
    num_refused = 0
    for row in TABLE:
        if isinstance(row.body, bytes) or row.path not in validators:
            continue
        is_fit = validators[row.path].is_valid(row.body)
        assert is_fit or row.status == 400, row.name
        num_refused += not is_fit
    assert num_refused > 150
    for path, body in {**FULL, **SMALL, "/tokenize": chat_body()}.items():
        assert validators[path].is_valid(body), path


def test_every_status_of_the_table_is_told_of(described: dict[str, Any]) -> None:
    for row in filter(documented, TABLE):
        path = row.path.partition("?")[0]
        (operation,) = described["paths"][path].values()
        assert str(row.status) in operation["responses"], row.name
    assert {int(s) for methods in described["paths"].values() for o in methods.values() for s in o["responses"]} == {
        200,
        *MEANINGS,
    } - {401}


# What comes back


@pytest.mark.parametrize("path", STREAMS)
@pytest.mark.parametrize("is_cut", [True, False])
async def test_answers(path: str, is_cut: bool, described: dict[str, Any]) -> None:
    server = Server(FakeBackend(say(CALL[:8] if is_cut else CALL)))
    response = await server.post(path, FULL[path])
    assert response.status_code == 200, response.text
    assert faults(described, told(described, path)["schema"], response.json(), is_closed=True) == []


@pytest.mark.parametrize("path", STREAMS)
async def test_streams(path: str, described: dict[str, Any]) -> None:
    response = await Server(FakeBackend(say(CALL))).post(path, {**FULL[path], "stream": True})
    schema = told(described, path, media_type="text/event-stream")["x-event-schema"]
    check = validator(described, schema, is_closed=True)
    seen = list(events(response))
    assert len(seen) > 1
    for event in seen:
        check.validate(event)


@pytest.mark.parametrize("path", STREAMS)
@pytest.mark.parametrize("error", [ReplicaLost("gone"), RuntimeError("bug"), Overloaded("full")])
async def test_a_stream_that_fails_ends_with_an_error(path: str, error: Exception, described: dict[str, Any]) -> None:
    fields = {**FULL[path], "stream": True} | ({"n": 1} if path == "/v1/chat/completions" else {})
    script = [*say("Hel", finish_reason=None), error]
    response = await Server(FakeBackend(script)).post(path, fields)
    assert response.status_code == 200
    assert "[DONE]" not in response.text
    schema = told(described, path, media_type="text/event-stream")["x-event-schema"]
    check = validator(described, schema, is_closed=True)
    *earlier, last = events(response)
    for event in [*earlier, last]:
        check.validate(event)
    assert earlier
    assert last["type"] == "response.failed" if path == "/v1/responses" else last["error"]["message"]
    assert "bug" not in response.text


@pytest.mark.parametrize("path", SMALL)
async def test_lookups(path: str, described: dict[str, Any]) -> None:
    response = await Server().post(path, SMALL[path])
    assert response.status_code == 200, response.text
    assert faults(described, told(described, path)["schema"], response.json(), is_closed=True) == []


@pytest.mark.parametrize("path", [o.path for o in OPERATIONS if o.method == "get" and o.answer is not str])
async def test_looking_around(path: str, described: dict[str, Any]) -> None:
    response = await Server(operated()).get(path.replace("{name}", "tiny"))
    assert faults(described, told(described, path)["schema"], response.json(), is_closed=True) == []


@pytest.mark.parametrize("path", [o.path for o in OPERATIONS if o.is_order])
@pytest.mark.parametrize(("replica", "status"), [(PREFILL.replica, 200), ("none", 404)])
async def test_orders(path: str, replica: str, status: int, described: dict[str, Any]) -> None:
    response = await Server(operated()).post(path.replace("{replica}", replica), {"role": "decode"})
    assert response.status_code == status, response.text
    assert faults(described, told(described, path, status)["schema"], response.json(), is_closed=True) == []


@pytest.mark.parametrize("state", [[ModelStatus("tiny", False, "no decode")], ReplicaLost("gone")])
async def test_not_ready(state: Any, described: dict[str, Any]) -> None:
    server = Server()
    server.backend.states = state
    response = await server.get("/ready")
    schema = told(described, "/ready", response.status_code)["schema"]
    assert faults(described, schema, response.json(), is_closed=True) == []


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (path, body, status)
        for path in FULL
        for body, status in (({"model": "none"}, 400), (b"[]", 400), ({**FULL[path], "model": "gpt"}, 404))
    ],
)
async def test_errors(path: str, body: Any, status: int, described: dict[str, Any]) -> None:
    response = await Server().post(path, body)
    assert response.status_code == status
    assert faults(described, told(described, path, status)["schema"], response.json(), is_closed=True) == []


@pytest.mark.parametrize(("error", "status"), [(Overloaded("full"), 429), (ReplicaLost("gone"), 503), (OSError(), 500)])
@pytest.mark.parametrize("path", STREAMS)
async def test_failures(path: str, error: Exception, status: int, described: dict[str, Any]) -> None:
    response = await Server(FakeBackend([error])).post(path, FULL[path])
    assert response.status_code == status
    assert faults(described, told(described, path, status)["schema"], response.json(), is_closed=True) == []
    (operation,) = described["paths"][path].values()
    promised = operation["responses"][str(status)]["headers"].keys()
    assert ("retry-after" in promised) is ("retry-after" in response.headers)
    assert "x-request-id" in response.headers


async def test_a_missing_model_is_told_in_the_told_shape(described: dict[str, Any]) -> None:
    response = await Server(processor=FakeProcessor("other")).get("/v1/models/tiny")
    assert faults(described, told(described, BY_NAME, 404)["schema"], response.json(), is_closed=True) == []
