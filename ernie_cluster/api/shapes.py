"""What answers look like: models from which `/openapi.json` is made. Here those of small routes and of errors.

The answers themselves are built elsewhere, as plain dicts, for speed; a test holds each of them to its shape, in which
no field may be missing. A field that is None here by default may be absent.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Shape(BaseModel):
    """Base of all shapes. More fields than are told may come in later versions."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class ErrorDetail(Shape):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    """The field at fault, as in `messages[0].content[1].image_url.url`."""
    code: str | None
    """A short reason for programs."""


class Error(Shape):
    """An error, as OpenAI's API tells it."""

    error: ErrorDetail


class MessagesErrorDetail(Shape):
    """What went wrong; the message names the field at fault."""

    type: str
    message: str


class MessagesError(Shape):
    """An error, as Anthropic's API tells it."""

    type: Literal["error"]
    error: MessagesErrorDetail
    request_id: str | None


class Model(Shape):
    """A served model."""

    id: str
    object: Literal["model"]
    created: int
    """Seconds since the epoch."""
    owned_by: str
    max_model_len: int
    """Most tokens of prompt and answer together."""


class Models(Shape):
    """All served models."""

    object: Literal["list"]
    data: list[Model]


class TokenizeAnswer(Shape):
    """A prompt as token ids."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeAnswer(Shape):
    """The text that token ids stand for."""

    prompt: str


class CountTokensAnswer(Shape):
    """The length of a prompt."""

    input_tokens: int


class Health(Shape):
    """The process lives."""

    status: Literal["ok"]


class ModelReadiness(Shape):
    """Whether one model can take requests."""

    model: str
    ready: bool
    detail: str
    """What is missing."""


class Readiness(Shape):
    """Whether every model can take requests."""

    ready: bool
    models: list[ModelReadiness] | None = None
    detail: str | None = None
    """Why nothing is known of the models."""


class Layer(Shape):
    """The experts of one layer: those for text have the indices 0 to n - 1, those for vision follow."""

    layer: int
    tokens: list[int]
    """That each expert got from this engine since its start."""
    table: list[list[int]]
    """The expert in every slot of each rank; -1 is an empty slot."""


class ReplicaExperts(Shape):
    """The experts of one replica; one of several data-parallel groups tells of its own tokens."""

    model: str
    role: str
    replica: str
    layers: list[Layer]


class Experts(Shape):
    """The experts of all replicas."""

    object: Literal["list"]
    data: list[ReplicaExperts]


class Version(Shape):
    """The version of this software."""

    version: str


class Document(Shape):
    """This document."""

    openapi: str
    info: dict[str, Any]
    paths: dict[str, Any]
    components: dict[str, Any]
