"""Requests of the documents against what the server says of itself: routes, bodies, methods of gRPC."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any
from urllib.parse import parse_qs, urlsplit

from google.protobuf import json_format
from jsonschema import Draft202012Validator

from ernie_cluster.api.openapi import document
from ernie_cluster.proto.v1 import inference_pb2 as pb

_PLAYGROUND = {"/", ""}
_ITSELF = {"/openapi.json"}
"""The document tells of all routes but its own."""

_WITH_VALUE = {"-H", "--header", "-d", "--data", "-X", "--request", "--max-time", "-o", "-w", "--cacert"}
_ALONE = {"-s", "-f", "-N", "-i", "-sS", "-fsS", "-sf", "--fail"}


@cache
def _document() -> dict[str, Any]:
    return document("0", lambda path: False)


def check_curl(arguments: list[str]) -> None:
    """Fail unless the route takes the method, and its body is one that the route's schema allows."""
    given, urls = _read(arguments)
    assert len(urls) == 1, f"curl of {urls}: one address each"
    parts = urlsplit(urls[0] if "://" in urls[0] else f"http://{urls[0]}")
    body = given.get("-d", given.get("--data"))
    method = given.get("-X", given.get("--request", "GET" if body is None else "POST")).lower()
    if parts.path in _PLAYGROUND | _ITSELF:
        assert method == "get"
        return
    operation = _operation(parts.path, method)
    _check_query(parts.query, operation)
    if body is not None and not body.startswith("@"):
        _check_body(body, operation)
    elif operation.get("requestBody", {}).get("required"):
        assert body, f"{parts.path} needs a body"


def _read(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    given: dict[str, str] = {}
    urls = []
    words = iter(arguments)
    for word in words:
        if word in _WITH_VALUE:
            given[word] = next(words)
        elif word.startswith("-"):
            assert word in _ALONE, f"curl {word}: teach it here"
        else:
            urls.append(word)
    return given, urls


def _operation(path: str, method: str) -> dict[str, Any]:
    steps = path.split("/")
    for template, operations in _document()["paths"].items():
        wanted = template.split("/")
        # a replica's id has slashes of its own: MODEL/ROLE/ID
        if "{replica}" in wanted:
            at = wanted.index("{replica}")
            behind = len(wanted) - at - 1
            fits = steps[:at] == wanted[:at] and steps[-behind:] == wanted[-behind:] and len(steps) >= len(wanted)
        else:
            fits = len(steps) == len(wanted) and all(
                w == s or w.startswith("{") for w, s in zip(wanted, steps, strict=True)
            )
        if fits and method in operations:
            found: dict[str, Any] = operations[method]
            return found
    raise AssertionError(f"no route takes {method.upper()} {path}")


def _check_query(query: str, operation: dict[str, Any]) -> None:
    known = {p["name"] for p in operation.get("parameters", ()) if p.get("in") == "query"}
    unknown = set(parse_qs(query)) - known
    assert not unknown, f"the route has no parameters {unknown}"


def _check_body(body: str, operation: dict[str, Any]) -> None:
    content = json.loads(body)
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    whole = {**schema, "components": _document()["components"]}
    errors = [e.message for e in Draft202012Validator(whole).iter_errors(content)]
    assert not errors, errors[:3]
    target = schema.get("$ref")
    if target is not None:  # the schema leaves unknown fields alone, as the server does; a document has none
        known = _document()["components"]["schemas"][target.rpartition("/")[2]]["properties"]
        assert set(content) <= set(known), f"the route has no fields {set(content) - set(known)}"


def check_grpcurl(arguments: list[str]) -> None:
    """Fail unless the method is one of ours, or of health or reflection, and the message is its request."""
    given: dict[str, str] = {}
    rest = []
    words = iter(arguments)
    for word in words:
        if word in ("-d", "-cacert", "-H"):
            given[word] = next(words)
        elif word.startswith("-"):
            assert word in ("-plaintext",), f"grpcurl {word}: teach it here"
        else:
            rest.append(word)
    assert len(rest) >= 2, f"grpcurl {rest}: an address, and what to do there"
    if rest[1] in ("list", "describe", "grpc.health.v1.Health/Check"):
        return
    name, _, method = rest[1].partition("/")
    service = pb.DESCRIPTOR.services_by_name["Inference"]
    assert name == service.full_name, f"there is no service {name}"
    assert method in service.methods_by_name, f"{name} has no {method}"
    message = getattr(pb, service.methods_by_name[method].input_type.name)()
    json_format.Parse(given.get("-d", "{}"), message)
