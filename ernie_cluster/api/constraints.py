"""The fields of a request that say what its answer must look like -> one grammar.

OpenAI's `response_format` and `tool_choice`, and vLLM's `structured_outputs` with its older spellings `guided_json`,
`guided_regex` and `guided_choice`. Where tools may be called beside a format, the answer is one or the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from pydantic_core import from_json

from ernie_cluster.api.formats import NamedTool, StructuredOutputs
from ernie_cluster.api.schemas import ChatBody, GenerationBody
from ernie_cluster.api.tool_schemas import AnyTool
from ernie_cluster.errors import InvalidRequest
from ernie_cluster.grammar import write
from ernie_cluster.grammar.check import check

_ANY_OBJECT = {"type": "object"}
_NO_ARGUMENTS = {"type": "object", "additionalProperties": False}


def grammar_of(body: GenerationBody, max_bytes: int, *, opens_reasoning: bool) -> str:
    """The grammar that a request asks for; "" when it asks for none. Tries it first, which takes a while.

    Args:
        body: of either route.
        max_bytes: longest grammar.
        opens_reasoning: the answer begins inside the model's reasoning, which stays free.

    Raises:
        InvalidRequest: names the field that cannot be enforced.
        Overloaded: see `check`.
    """
    found = list(_bodies(body))
    if not found:
        return ""
    for param, text in found:
        num_bytes = len(text.encode())
        if num_bytes > max_bytes:
            raise InvalidRequest(f"{param} makes a grammar of {num_bytes} bytes; the limit is {max_bytes}", param)
        _named(param, lambda text=text: check(write.grammar(text)))  # type: ignore[misc]
    return write.grammar(*(text for _, text in found), after_thinking=opens_reasoning)


def _bodies(body: GenerationBody) -> Iterator[tuple[str, str]]:
    """(field at fault if it is wrong, what the answer may be)."""
    formats = list(_formats(body))
    if len(formats) > 1:
        (first, _), (second, _) = formats[:2]
        raise InvalidRequest(f"{second} and {first} both give the answer's format; send one of them", second)
    if isinstance(body, ChatBody):
        if body.must_call:
            yield "tools", _calls(body)
            return
        if formats and body.offered_tools:
            yield "tools", _calls(body)
    yield from formats


def _formats(body: GenerationBody) -> Iterator[tuple[str, str]]:
    wanted, vllm = body.response_format, body.structured_outputs or StructuredOutputs.model_validate({})
    if wanted is not None and wanted.type == "json_schema":
        if wanted.json_schema is None:
            raise InvalidRequest("response_format.json_schema is missing", "response_format.json_schema")
        schema = wanted.json_schema.definition
        param = "response_format.json_schema.schema"
        yield param, _json_body(param, _ANY_OBJECT if schema is None else schema)
    is_object = {
        "response_format": wanted is not None and wanted.type == "json_object",
        "structured_outputs.json_object": vllm.json_object,
    }
    yield from ((param, write.json_body(_ANY_OBJECT)) for param, is_wanted in is_object.items() if is_wanted)
    schemas = {"guided_json": body.guided_json, "structured_outputs.json": vllm.definition}
    yield from ((param, _json_body(param, schema)) for param, schema in schemas.items() if schema is not None)
    regexes = {"guided_regex": body.guided_regex, "structured_outputs.regex": vllm.regex}
    yield from ((param, write.regex_body(regex)) for param, regex in regexes.items() if regex is not None)
    choices = {"guided_choice": body.guided_choice, "structured_outputs.choice": vllm.choice}
    yield from ((param, write.choice_body(some)) for param, some in choices.items() if some is not None)


def _json_body(param: str, schema: Any) -> str:
    """vLLM takes a schema as JSON text, too."""
    try:
        schema = from_json(schema, allow_inf_nan=False) if isinstance(schema, str) else schema
        if isinstance(schema, dict):
            return write.json_body(schema)
    except ValueError:  # also for half a surrogate pair, which `json` would take
        pass
    raise InvalidRequest(f"{param}: give a JSON schema, which is an object", param)


def _calls(body: ChatBody) -> str:
    tools = _callable_tools(body)
    return write.calls_body(
        {tool.function.name: _parameters(i, tool) for i, tool in tools}, at_most_one=body.parallel_tool_calls is False
    )


def _callable_tools(body: ChatBody) -> list[tuple[int, AnyTool]]:
    tools = list(enumerate(body.offered_tools))
    if not isinstance(body.tool_choice, NamedTool):
        if not tools:
            raise InvalidRequest("tool_choice is required, but no tools were sent", "tool_choice")
        return tools
    name = body.tool_choice.function.name
    named = [(i, tool) for i, tool in tools if tool.function.name == name]
    if not named:
        raise InvalidRequest("tool_choice names a function that is not among the tools", "tool_choice.function.name")
    return named


def _parameters(index: int, tool: AnyTool) -> dict[str, Any]:
    schema = tool.function.parameters
    if schema is None:
        return _NO_ARGUMENTS
    if schema.get("type", "object") != "object":
        param = f"tools[{index}].function.parameters"
        raise InvalidRequest(f"{param}: the schema of a call's arguments must be of type object", param)
    return {**_ANY_OBJECT, **schema}


def _named(param: str, work: Callable[[], None]) -> None:
    """Run `work`; its errors name a field."""
    try:
        work()
    except InvalidRequest as e:
        raise InvalidRequest(f"{param}: {e.message}", param, e.code) from None
