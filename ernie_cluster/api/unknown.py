"""Fields that nobody reads: ignored, as the APIs themselves do, unless the client asks to be told with `x-strict: true`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Protocol

from pydantic import AliasChoices, BaseModel, ValidationError
from pydantic.fields import FieldInfo
from starlette.datastructures import Headers
from starlette.types import Scope

from ernie_cluster.api.dialect import Asked, Dialect
from ernie_cluster.api.validate import param_of, shortened
from ernie_cluster.errors import InvalidRequest

HEADER = "x-strict"


class JsonDialect(Dialect[dict[str, Any]], Protocol):
    """A route whose requests are JSON."""

    @property
    def body_type(self) -> type[BaseModel]:
        """What a request's body is read as."""
        ...


@dataclass(frozen=True, slots=True)
class Exacting:
    """A dialect that refuses what it does not read."""

    dialect: JsonDialect

    @property
    def id_prefix(self) -> str:
        return self.dialect.id_prefix

    def read(self, raw: dict[str, Any]) -> Asked:
        """As the dialect does; raises InvalidRequest for unknown fields, too."""
        asked = self.dialect.read(raw)
        refuse_unknown(self.dialect.body_type, raw)
        return asked


def wants_strict(scope: Scope) -> bool:
    """Whether the client wants to be told; raises InvalidRequest when its header does not say."""
    value = Headers(scope=scope).get(HEADER, "false")
    if value not in ("true", "false"):
        raise InvalidRequest(f"header {HEADER} is {shortened(value)}; send true or false")
    return value == "true"


def refuse_unknown(kind: type[BaseModel], raw: Mapping[str, Any]) -> None:
    """Refuse what nobody reads, at any depth.

    Args:
        kind: what the body is read as.
        raw: a body that can be read.

    Raises:
        InvalidRequest: names the first such field, and the known one that is spelled most like it.
    """
    try:
        kind.model_validate(raw, extra="forbid")
    except ValidationError as e:
        loc = e.errors(include_url=False, include_context=False)[0]["loc"]
        param, name = param_of(loc), str(loc[-1])[:64]
        close = get_close_matches(name, _names_at(kind.model_validate(raw), loc[:-1]), n=1)
        hint = f"; did you mean {close[0]}?" if close else "; leave it out"
        raise InvalidRequest(f"{param} is not a field that is read here{hint}", param, "unknown_parameter") from None


def _names_at(body: Any, loc: Sequence[int | str]) -> list[str]:
    """Names of the fields that the object at `loc` may have."""
    for part in loc:
        if isinstance(part, int):
            body = body[part]
        elif not part.startswith("<"):
            fields = type(body).model_fields.items()
            body = getattr(body, next(name for name, field in fields if part in _spellings(name, field)))
    return [spelling for name, field in type(body).model_fields.items() for spelling in _spellings(name, field)]


def _spellings(name: str, field: FieldInfo) -> Iterator[str]:
    alias = field.validation_alias
    if isinstance(alias, AliasChoices):
        yield from (choice for choice in alias.choices if isinstance(choice, str))
    else:
        yield alias if isinstance(alias, str) else name
