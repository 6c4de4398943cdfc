"""Every route of the app, as `/openapi.json` tells of it: bodies, answers and statuses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ernie_cluster.api import admin, anthropic_body, responses_body, schemas, tokens
from ernie_cluster.api.operator import ClusterView, FaultsView, ReplicaView
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

_LOOKING = frozenset({INTERNAL.http, 431})
"""Statuses of routes that take no body, beside 200."""
_READING = frozenset({400, 408, 413, 415})
"""Statuses of reading a body."""
_ORDERING = _LOOKING | {403, 404, 409, 503}
"""Statuses of orders to replicas."""
_ASKING = _LOOKING | _READING | {status.http for _, status in TABLE} - {401, 403, 409}
"""Statuses of routes on which models are asked."""


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
    """Type of the request's body; a route with one is a POST, and so is an order."""
    event: Any = None
    """Type of a stream's events."""
    harmless: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """See `refuse_unsupported`."""
    more_statuses: frozenset[int] = frozenset()
    may_be_empty: bool = False
    """Whether it goes without a body."""
    is_order: bool = False
    """To a replica."""
    is_removal: bool = False
    query: Mapping[str, Schema] = field(default_factory=dict)
    """Parameters behind the path's question mark."""

    @property
    def method(self) -> str:
        if self.is_removal:
            return "delete"
        return "post" if self.is_order or self.body is not None else "get"

    @property
    def statuses(self) -> frozenset[int]:
        """Of answers that are errors, 401 aside."""
        if self.is_order:
            return self.more_statuses | _ORDERING | (frozenset() if self.body is None else _READING)
        return self.more_statuses | (_LOOKING if self.body is None else _ASKING)

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
    Operation(
        "/admin/status",
        "cluster",
        "Show the models, their replicas, and what was decided lately.",
        ClusterView,
        more_statuses=frozenset({503}),
    ),
    Operation(
        "/admin/decisions",
        "list_decisions",
        "List what the autoscaler and operators did, the newest first.",
        admin.Decisions,
        more_statuses=frozenset({400, 503}),
        query={
            "limit": {
                "type": "integer",
                "minimum": 1,
                "maximum": admin.MAX_DECISIONS,
                "default": admin.DEFAULT_DECISIONS,
            }
        },
    ),
    Operation(
        "/admin/replicas/{replica}/drain",
        "drain_replica",
        "Let a replica finish what it has and take no more; others go on with what is left when its time is up.",
        ReplicaView,
        admin.DrainBody,
        may_be_empty=True,
        is_order=True,
    ),
    Operation(
        "/admin/replicas/{replica}/restart",
        "restart_replica",
        "Drain a replica and start another one in its place.",
        ReplicaView,
        admin.DrainBody,
        may_be_empty=True,
        is_order=True,
    ),
    Operation(
        "/admin/replicas/{replica}/undrain",
        "undrain_replica",
        "Let a drained replica take work again.",
        ReplicaView,
        is_order=True,
    ),
    Operation(
        "/admin/replicas/{replica}/role",
        "give_role",
        "Give a replica work of a role from now on.",
        ReplicaView,
        admin.RoleBody,
        is_order=True,
    ),
    Operation(
        "/admin/faults",
        "list_faults",
        "List the faults on purpose of all processes.",
        FaultsView,
        more_statuses=frozenset({403, 503}),
    ),
    Operation(
        "/admin/faults",
        "add_fault",
        "Set a fault on purpose, for a while; in staging only.",
        FaultsView,
        admin.FaultBody,
        more_statuses=frozenset({403, 503}),
    ),
    Operation(
        "/admin/faults",
        "clear_faults",
        "End all faults that were set so.",
        FaultsView,
        more_statuses=frozenset({403, 503}),
        is_removal=True,
    ),
    Operation("/version", "version", "Tell the version.", Version),
    Operation("/openapi.json", "openapi", "Show this document.", Document),
)
"""Every route of the app."""
