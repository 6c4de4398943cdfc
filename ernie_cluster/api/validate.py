"""Checks the fields of a request's body, whichever API it is written for.

Types are strict ("1" and true are no numbers, NaN is none either); unknown fields are ignored, as the APIs themselves
do (but see `unknown.py`); fields that would change the answer and cannot be honoured are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ernie_cluster.errors import InvalidRequest

M = TypeVar("M", bound=BaseModel)


class Strict(BaseModel):
    """Base of all bodies and their parts. A union's tag is written `<tag>`, so that error paths can leave it out."""

    model_config = ConfigDict(
        strict=True, extra="ignore", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


Unread = Annotated[Any, Field(exclude=True)]
"""A field that our own answers bear and that makes no difference when it comes back."""


def validated(kind: type[M], raw: Mapping[str, Any]) -> M:
    """Check types and ranges.

    Raises:
        InvalidRequest: names the first field at fault.
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as e:
        error = e.errors(include_url=False, include_context=False)[0]
        param = param_of(error["loc"])
        got = "" if error["type"] == "missing" else f" (got {shortened(error['input'])})"
        raise InvalidRequest(f"{param}: {error['msg']}{got}", param) from None


def refuse_unsupported(raw: Mapping[str, Any], harmless: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse what is not supported, unless it asks for nothing.

    Args:
        raw: a request's body.
        harmless: unsupported fields, and the values with which they ask for nothing.

    Raises:
        InvalidRequest: names the field.
    """
    for name, values in harmless.items():
        value = raw.get(name)
        if not any(type(value) is type(h) and value == h for h in values):
            raise InvalidRequest(f"{name} is not supported here; leave it out", name, "unsupported_parameter")


def type_tag(value: Any) -> str:
    """Tag of an object that names its own type."""
    return f"<{value.get('type') if isinstance(value, dict) else None}>"


def list_tag(value: Any) -> str:
    """Tag of a value that is a list or a text."""
    return "<list>" if isinstance(value, list) else "<text>"


def param_of(loc: Sequence[int | str]) -> str:
    """`("messages", 0, "content", "<list>", 1, "<text>", "text")` is `messages[0].content[1].text`."""
    out = ""
    for part in loc:
        if isinstance(part, int):
            out += f"[{part}]"
        elif part == "[key]":
            break
        elif not part.startswith("<"):
            out += f".{part[:64]}" if out else part[:64]
    return out


def shortened(value: Any, limit: int = 60) -> str:
    """The value itself if it is a scalar, else its type: errors do not send a client's data back to it."""
    if isinstance(value, (dict, list)):
        return f"an object with {len(value)} fields" if isinstance(value, dict) else f"a list of {len(value)}"
    if isinstance(value, str):
        return repr(value if len(value) <= limit else value[:limit] + "...")
    return repr(value)[:limit]
