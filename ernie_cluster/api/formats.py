"""Request fields that bind the form of an answer, in OpenAI's and vLLM's spelling; `constraints.py` says what they mean."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, SkipValidation, Tag

from ernie_cluster.api.validate import Strict


class JsonSchema(Strict):
    """OpenAI's wrapping of a schema; enforced whether it is called strict or not."""

    name: str
    definition: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


Choices = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, fail_fast=True)]
Regex = Annotated[str, Field(min_length=1)]


class StructuredOutputs(Strict):
    """vLLM's `structured_outputs`; of its other fields none is supported."""

    model_config = ConfigDict(extra="forbid")

    definition: Annotated[dict[str, Any] | str | None, SkipValidation] = Field(None, alias="json")
    """A JSON schema, or its text."""
    regex: Regex | None = None
    choice: Choices | None = None
    json_object: bool | None = None


class FunctionName(Strict):
    """Which function."""

    name: str


class NamedTool(Strict):
    """A function that the model has to call."""

    type: Literal["function"]
    function: FunctionName


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<mode>")] | Annotated[NamedTool, Tag("<function>")],
    Discriminator(lambda value: "<function>" if isinstance(value, dict) else "<mode>"),
]
