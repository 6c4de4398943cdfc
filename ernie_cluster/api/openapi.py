"""The document behind `/openapi.json`: every route, made from the models that read requests and the shapes of answers.

What a model cannot say is checked elsewhere and answered with 400: how fields depend on each other, and bounds that
come from the configuration or from the served model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from ernie_cluster.api import anthropic_body, responses_body, schemas, tokens
from ernie_cluster.api.shapes import (
    CountTokensAnswer,
    DetokenizeAnswer,
    Document,
    Error,
    Experts,
    Health,
    MessagesError,
    Model,
    Models,
    Readiness,
    TokenizeAnswer,
    Version,
)
from ernie_cluster.api.shapes_messages import MessageAnswer, MessagesEvent
from ernie_cluster.api.shapes_openai import ChatAnswer, ChatEvent, CompletionAnswer, CompletionEvent
from ernie_cluster.api.shapes_responses import Response, ResponsesEvent
from ernie_cluster.api.status import INTERNAL, TABLE, is_anthropic
from ernie_cluster.api.unsupported import UNSUPPORTED

Schema = dict[str, Any]

MEANINGS: Mapping[int, str] = {
    400: "The request can never be served; the error names the field.",
    401: "The request bears no key that opens this route.",
    404: "No such model is served.",
    408: "The body did not arrive in time.",
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

_LOOKING = frozenset({INTERNAL.http, 431})
"""Statuses of routes that take no body, beside 200."""
_ASKING = _LOOKING | {status.http for _, status in TABLE} - {401} | {408, 413, 415}
"""Statuses of routes that take one."""

_DESCRIPTION = """\
OpenAI's and Anthropic's APIs over one service. Unknown fields are ignored, and null means not given. Integers have no
fraction, not even `.0`; numbers are finite. Fields that depend on each other, and bounds that depend on the
configuration or on the model, are checked beyond what the schemas here say: the error, with status 400, names the field.
Other paths get 404, other methods 405."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One route."""

    path: str
    name: str
    """What client generators call it."""
    summary: str
    answer: Any
    """Type of the whole answer; `str` is plain text."""
    body: Any = None
    """Type of the request's body; a route with one is a POST."""
    event: Any = None
    """Type of a stream's events."""
    harmless: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """See `refuse_unsupported`."""
    more_statuses: frozenset[int] = frozenset()

    @property
    def method(self) -> str:
        return "get" if self.body is None else "post"

    @property
    def error(self) -> Any:
        return MessagesError if is_anthropic(self.path) else Error

    @property
    def types(self) -> Iterable[Any]:
        """All that need a schema."""
        return (kind for kind in (self.body, self.answer, self.event, self.error) if kind is not None)


OPERATIONS: tuple[Operation, ...] = (
    Operation(
        "/v1/chat/completions",
        "create_chat_completion",
        "Answer a chat.",
        ChatAnswer,
        schemas.ChatBody,
        ChatEvent,
        UNSUPPORTED,
    ),
    Operation(
        "/v1/completions",
        "create_completion",
        "Go on after a prompt.",
        CompletionAnswer,
        schemas.CompletionBody,
        CompletionEvent,
        UNSUPPORTED,
    ),
    Operation(
        "/v1/responses",
        "create_response",
        "Answer a conversation of items; nothing is stored.",
        Response,
        responses_body.ResponsesBody,
        ResponsesEvent,
        {**responses_body.HARMLESS, "previous_response_id": (None,)},
    ),
    Operation(
        "/v1/messages",
        "create_message",
        "Answer a conversation, in Anthropic's words.",
        MessageAnswer,
        anthropic_body.MessagesBody,
        MessagesEvent,
        anthropic_body.HARMLESS,
    ),
    Operation(
        "/v1/messages/count_tokens",
        "count_tokens",
        "Tell how long a message's prompt is.",
        CountTokensAnswer,
        anthropic_body.PromptBody,
        harmless=anthropic_body.HARMLESS,
    ),
    Operation(
        "/tokenize",
        "tokenize",
        "Tell a prompt's token ids.",
        TokenizeAnswer,
        tokens.TokenizeBody,
        harmless=tokens.HARMLESS,
    ),
    Operation("/detokenize", "detokenize", "Tell what token ids stand for.", DetokenizeAnswer, tokens.DetokenizeBody),
    Operation("/v1/models", "list_models", "List what is served.", Models),
    Operation("/v1/models/{name}", "retrieve_model", "Describe a served model.", Model, more_statuses=frozenset({404})),
    Operation("/health", "health", "Tell that the process lives.", Health),
    Operation(
        "/ready", "ready", "Tell whether every model can take requests.", Readiness, more_statuses=frozenset({503})
    ),
    Operation("/metrics", "metrics", "Show the metrics, in Prometheus' text format.", str),
    Operation(
        "/debug/experts",
        "experts",
        "Show how many tokens each expert has had, and on which ranks it stands.",
        Experts,
        more_statuses=frozenset({503}),
    ),
    Operation("/version", "version", "Tell the version.", Version),
    Operation("/openapi.json", "openapi", "Show this document.", Document),
)
"""Every route of the app."""


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
    paths = {o.path: {o.method: _operation(o, refs, needs_key=closes(o.path))} for o in OPERATIONS}
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
    if "{name}" in operation.path:
        out["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
    if operation.body is not None:
        out["requestBody"] = {"required": True, "content": _json(refs[operation.body])}
    statuses = operation.more_statuses | (_LOOKING if operation.body is None else _ASKING)
    if operation.event is None:
        statuses -= {499}
    if needs_key:
        statuses |= {401}
    out["responses"] = {"200": _answer(operation, refs)} | {
        str(status): _failure(status, operation, refs) for status in sorted(statuses)
    }
    out["security"] = [{"bearer": []}, {"key": []}] if needs_key else []
    return out


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
