"""The tools of a request: functions of the client's, and those that the server itself runs, as `{"type": "calculator"}`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from ernie_cluster.api.validate import Strict
from ernie_cluster.builtin.registry import TOOLS
from ernie_cluster.errors import InvalidRequest


class Function(Strict):
    """A function that the model may call; `parameters` is a JSON schema, which only the template reads."""

    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Strict):
    """OpenAI's wrapping of a function."""

    type: Literal["function"]
    function: Function

    @property
    def definition(self) -> dict[str, Any]:
        """What the template is told."""
        return self.model_dump(exclude_none=True)


def _known(name: str) -> str:
    if name not in TOOLS:
        raise PydanticCustomError("unknown_tool", f"this server runs no such tool; it runs {', '.join(TOOLS)}")
    return name


class OwnTool(Strict):
    """A tool that the server itself runs."""

    type: Annotated[str, AfterValidator(_known), Field(json_schema_extra={"enum": list(TOOLS)})]

    @property
    def definition(self) -> dict[str, Any]:
        """What the template is told; the same as if a client had sent it as a function."""
        return dict(TOOLS[self.type].definition)

    @property
    def function(self) -> Function:
        """The function by which the model calls it."""
        return Function.model_validate(self.definition["function"])


def own_tool_tag(value: Any) -> str:
    """`<own>` for a tool that is to be run here, `<function>` for any other, in the spelling of all our APIs."""
    kind = value.get("type") if isinstance(value, Mapping) else None
    return "<own>" if isinstance(kind, str) and kind not in ("function", "custom") else "<function>"


Theirs = TypeVar("Theirs")
Ours = TypeVar("Ours")
EitherTool = Annotated[
    Annotated[Theirs, Tag("<function>")] | Annotated[Ours, Tag("<own>")], Discriminator(own_tool_tag)
]
"""A client's function or a tool of our own, in one API's spelling."""
AnyTool = EitherTool[Tool, OwnTool]


def check_tool_names(tools: Sequence[AnyTool]) -> None:
    """A call must say whether it is ours to run; raises InvalidRequest."""
    own = {tool.function.name for tool in tools if isinstance(tool, OwnTool)}
    seen: set[str] = set()
    for i, tool in enumerate(tools):
        name = tool.function.name
        if name in seen and name in own:
            raise InvalidRequest(
                f"tools[{i}]: a tool of this name, which this server runs itself, is there already; rename or leave "
                "out one of them",
                f"tools[{i}]",
            )
        seen.add(name)
