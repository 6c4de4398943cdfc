"""The document behind `/openapi.json`: every route, made from the models that read requests and the shapes of answers.

What a model cannot say is checked elsewhere and answered with 400: how fields depend on each other, and bounds that
come from the configuration or from the served model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from ernie_cluster.api.routes import OPERATIONS, Operation, Schema
from ernie_cluster.api.shapes import Readiness

MEANINGS: Mapping[int, str] = {
    400: "The request can never be served; the error names the field.",
    401: "The request bears no key that opens this route.",
    403: "As this server is set up nobody may do this; the error says what to set.",
    404: "No such model is served, or no such replica is there.",
    408: "The body did not arrive in time.",
    409: "The replica cannot do this; the error says why.",
    413: "The body is too large.",
    415: "The body is not plain `application/json`.",
    429: "No room now, or the key has used up what it may use for now.",
    431: "The headers are too many or too large.",
    499: "The request was aborted before it was finished.",
    500: "A fault of this software.",
    503: "A part of the service is not there, or failed; try again.",
    504: "The answer was not finished in time.",
}
"""HTTP status -> what it says."""

_DESCRIPTION = """\
OpenAI's and Anthropic's APIs over one service. Unknown fields are ignored, and null means not given. Integers have no
fraction, not even `.0`; numbers are finite. Fields that depend on each other, and bounds that depend on the
configuration or on the model, are checked beyond what the schemas here say: the error, with status 400, names the field.
Other paths get 404, other methods 405."""


def document(version: str, closes: Callable[[str], bool]) -> Schema:
    """The OpenAPI 3.1 document; takes a tenth of a second.

    Args:
        version: of this software.
        closes: whether a path needs a key.
    """
    refs, definitions = _schemas_of({kind for operation in OPERATIONS for kind in operation.types})
    for operation in OPERATIONS:
        if operation.harmless:
            properties = definitions[refs[operation.body]["$ref"].rpartition("/")[2]]["properties"]
            properties.update({name: _only(values) for name, values in operation.harmless.items()})
    paths: dict[str, Schema] = {}
    for o in OPERATIONS:
        paths.setdefault(o.path, {})[o.method] = _operation(o, refs, needs_key=closes(o.path))
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "ernie_cluster",
            "version": version,
            "description": _DESCRIPTION,
            "license": {"name": "Apache License 2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": definitions,
            "headers": {
                "RequestId": {
                    "description": "The request's own `x-request-id`, or one that was made for it.",
                    "schema": {"type": "string"},
                },
                "RetryAfter": {
                    "description": "Seconds after which another try is worth while.",
                    "schema": {"type": "integer", "minimum": 1},
                },
            },
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


class _Generator(GenerateJsonSchema):
    """Pydantic's, with shorter names of models that share one, and no titles that repeat a field's name."""

    def normalize_name(self, name: str) -> str:
        return super().normalize_name(name.removeprefix("ernie_cluster.api."))

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _schemas_of(types: Iterable[Any]) -> tuple[dict[Any, Schema], dict[str, Schema]]:
    """Schema of each type, and the definitions that these lead to."""
    ordered = sorted(types, key=repr)
    found, defined = TypeAdapter.json_schemas(
        [(kind, "validation", TypeAdapter(kind)) for kind in ordered],
        ref_template="#/components/schemas/{model}",
        schema_generator=_Generator,
    )
    return {kind: found[kind, "validation"] for kind in ordered}, defined["$defs"]


def _only(values: Iterable[Any]) -> Schema:
    return {"description": "Not supported; may be sent where it asks for nothing.", "enum": list(values)}


def _operation(operation: Operation, refs: Mapping[Any, Schema], *, needs_key: bool) -> Schema:
    out: Schema = {"operationId": operation.name, "summary": operation.summary}
    if parameters := _parameters(operation):
        out["parameters"] = parameters
    if operation.body is not None:
        out["requestBody"] = {"required": not operation.may_be_empty, "content": _json(refs[operation.body])}
    statuses = operation.statuses
    if operation.event is None:
        statuses -= {499}
    if needs_key:
        statuses |= {401}
    out["responses"] = {"200": _answer(operation, refs)} | {
        str(status): _failure(status, operation, refs) for status in sorted(statuses)
    }
    out["security"] = [{"bearer": []}, {"key": []}] if needs_key else []
    return out


def _parameters(operation: Operation) -> list[Schema]:
    in_path: list[Schema] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", operation.path)
    ]
    return in_path + [{"name": name, "in": "query", "schema": schema} for name, schema in operation.query.items()]


def _answer(operation: Operation, refs: Mapping[Any, Schema]) -> Schema:
    content = _json(refs[operation.answer])
    if operation.answer is str:
        content = {"text/plain": content["application/json"]}
    if operation.event is not None:
        words = "With `stream: true`: server-sent events, whose data is as `x-event-schema` says, or `[DONE]`."
        events = {"schema": {"description": words}, "x-event-schema": refs[operation.event]}
        content["text/event-stream"] = events
    return {"description": "The answer.", "headers": _headers("RequestId"), "content": content}


def _failure(status: int, operation: Operation, refs: Mapping[Any, Schema]) -> Schema:
    error = refs[operation.error]
    if operation.answer is Readiness and status == 503:
        error = {"anyOf": [refs[Readiness], error]}
    headers = _headers("RequestId", *(["RetryAfter"] if status in (429, 503) else []))
    return {"description": MEANINGS[status], "headers": headers, "content": _json(error)}


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _headers(*names: str) -> Schema:
    spelled = {"RequestId": "x-request-id", "RetryAfter": "retry-after"}
    return {spelled[name]: {"$ref": f"#/components/headers/{name}"} for name in names}
