"""The views of `operator.py` from JSON, for programs that ask `/admin`, and as JSON for people to read."""

from __future__ import annotations

from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from ernie_cluster.errors import ErnieClusterError

V = TypeVar("V")


def view_of(kind: type[V], body: bytes) -> V:
    """A view as JSON tells of it; fields of later versions are left out.

    Args:
        kind: one of `operator.py`, such as ClusterView.

    Raises:
        ErnieClusterError: it is none.
    """
    try:
        return TypeAdapter(kind).validate_json(body)
    except ValidationError as e:
        error = e.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, error["loc"])) or "all of it"
        raise ErnieClusterError(
            f"the answer is no {kind.__name__} as this version knows it ({where}: {error['msg']}); is the server an "
            "ernie_cluster of the same version?"
        ) from None


def readable(view: object) -> str:
    """As JSON with a line per field, which `view_of` reads."""
    return TypeAdapter(type(view)).dump_json(view, indent=2).decode()
